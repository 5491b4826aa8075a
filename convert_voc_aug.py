"""Turns SBD's MATLAB labels into VOC's palette PNGs and writes the lists `aug` and `trainaug`:
`python convert_voc_aug.py data/VOCdevkit data/VOCdevkit/VOCaug --nproc 8`; `--download` fetches both data sets first.

A run that was interrupted continues: it keeps every label that is whole and newer than its .mat file.
"""
import signal
import sys

import cli

PROG = "convert_voc_aug.py"
TERMINATED = 128 + signal.SIGTERM  # the exit status, as shells report a signal


def parse_args(argv=None):
    parser = cli.Parser(prog=PROG, description="Turn SBD's labels into VOC's form.")
    parser.add_argument("devkit", metavar="DEVKIT", type=cli.file_path,
                        help="the folder that holds VOC2012, say data/VOCdevkit")
    parser.add_argument("aug", metavar="AUG", type=cli.file_path,
                        help="SBD's folder, with dataset/cls or cls in it, say data/VOCdevkit/VOCaug")
    parser.add_argument("--nproc", type=cli.number(1, 1024), default=cli.usable_cores(), metavar="N",
                        help="processes (default: the CPU cores, here %(default)s)")
    parser.add_argument("-o", dest="out_dir", type=cli.file_path, metavar="DIR",
                        help="where the PNGs go (default: DEVKIT/VOC2012/SegmentationClassAug, where train.py looks)")
    parser.add_argument("--download", action="store_true",
                        help="fetch VOC 2012 (2 GB) into DEVKIT and SBD (1.4 GB) into AUG first, unless they are there")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))  # like Ctrl-C: the workers end, too
    import sbd

    if args.download:
        sbd.fetch_archives(args.devkit, args.aug)
    problems = sbd.convert_data_set(args.devkit, args.aug, args.out_dir, args.nproc)
    for problem in problems:
        print(f"{PROG}: error: {problem}", file=sys.stderr)
    if problems:
        print(f"{PROG}: error: the lists leave these out; mend the files and run the same command again",
              file=sys.stderr)
    return 1 if problems else 0


if __name__ == "__main__":
    cli.run(main, PROG)
