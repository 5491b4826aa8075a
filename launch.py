"""Starts train.py once a card, on one machine or several, by PyTorch's torchrun: for --device_list and --nnodes.

Apart from train.py, as it runs where there are no several processes yet, and needs neither network nor data.
"""
import argparse
import os
import sys

from cli import Parser, whole_number

VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}  # by these a process sees some devices
DEFAULT_PORT = 29500  # torchrun's
SAVING_TIME = 300  # seconds that a stopped run has to save a checkpoint; torchrun's own are 30
UNDER_TORCHRUN = "WORLD_SIZE" in os.environ


def add_launch_flags(parser):
    """The flags that are torchrun's business, not that of the processes it starts. -> their parser, for itself"""
    group = parser.add_argument_group("several machines, and what happens to their processes (with --device_list)")
    group.add_argument("--nnodes", type=whole_number(1), metavar="N", help="number of machines (default: 1)")
    group.add_argument("--node_rank", type=whole_number(0), metavar="R", help="which of them this is (default: 0)")
    group.add_argument("--addr", "--master_addr", metavar="IP",
                       help="address of machine 0, where all processes meet (default: this machine)")
    group.add_argument("--master_port", type=whole_number(1, 65535), metavar="P",
                       help=f"a free port there (default: {DEFAULT_PORT}; on one machine without --addr any)")
    group.add_argument("--local_addr", metavar="IP", help="address of this machine; NPUs get it as HCCL_IF_IP")
    group.add_argument("--max_restarts", type=whole_number(0), metavar="N",
                       help="how often to go on from the latest checkpoint after a process died (default: 0)")
    return parser


def device_list(text):
    """An argparse type: `0,1,2` -> ["0", "1", "2"]."""
    devices = [str(whole_number(0)(part)) for part in text.split(",")]
    if len(set(devices)) < len(devices):
        raise argparse.ArgumentTypeError(f"takes each device once, not '{text}'")
    return devices


def check_launch(parser, args):
    """What does not go together among the flags about several processes is a usage error."""
    launch_flags = vars(add_launch_flags(Parser(add_help=False)).parse_args([]))
    given = [flag for flag in launch_flags if getattr(args, flag) is not None]
    if args.timeout is not None and not (args.device_list or UNDER_TORCHRUN):
        parser.error(f"--timeout {args.timeout} has no effect without --device_list: there is nobody to wait for")
    if UNDER_TORCHRUN:
        for flag in [*given, *(["device_id"] if args.device_id is not None else [])]:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect under torchrun, which deals that out itself")
    if args.device_list and args.device_id is not None:
        parser.error("--device_id and --device_list do not go together")
    if given and not args.device_list:
        parser.error(f"--{given[0]} {getattr(args, given[0])} has no effect without --device_list, which says how many "
                     "processes there are")
    nodes = args.nnodes or 1
    if (args.node_rank or 0) >= nodes:
        parser.error(f"--node_rank {args.node_rank}: the last of {nodes} is {nodes - 1}; --nnodes says how many")
    if nodes > 1 and None in (args.addr, args.node_rank):
        parser.error(f"--nnodes {nodes} takes --node_rank and --master_addr, too")
    if args.device_list:
        args.device_list = visible_devices(args.device, args.device_list)
        started = os.environ.get("LOCAL_WORLD_SIZE", 1)
        if UNDER_TORCHRUN and len(args.device_list) != int(started):
            parser.error(f"torchrun started {started} processes here for {len(args.device_list)} devices: "
                         + ",".join(args.device_list))
    args.launch = not UNDER_TORCHRUN and (bool(given) or len(args.device_list or ()) > 1)


def visible_devices(device, devices):
    """The devices to use, one process each; this and later processes see only these, counted from 0.

    Where the environment names some already, those win: a scheduler or a user who sets that knows the machine.
    """
    kinds = [kind for kind in VISIBLE if device in ("auto", kind) or (device, kind) == ("gpu", "cuda")]
    for variable in (VISIBLE[kind] for kind in kinds):
        by_hand = os.environ.get(variable)
        if by_hand:
            if by_hand != ",".join(devices):
                print(f"train.py: {variable}={by_hand} is set, it wins over --device_list {','.join(devices)}",
                      file=sys.stderr)
            return by_hand.split(",")
    for kind in kinds:
        os.environ.setdefault(VISIBLE[kind], ",".join(devices))
    return devices


def launch(args, script):
    """Runs `script` under torchrun, a process for each device, with the flags of this process. -> the exit status"""
    with_own_level = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else each failed try to connect prints a C++ stack
    from torch.distributed import DistError, run  # takes seconds, so not before the flags are checked
    if not with_own_level:
        del os.environ["TORCH_CPP_LOG_LEVEL"]  # read by now; the processes of the run keep their warnings
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_TIME))  # old PyTorch always waits 30 s
    if args.local_addr:
        os.environ.setdefault("HCCL_IF_IP", args.local_addr)
    address, port = args.addr or "127.0.0.1", args.master_port or DEFAULT_PORT
    meeting = ["--standalone"]
    if args.addr or args.master_port:
        # A machine tries to reach machine 0 twice, each time for the whole of torchrun's timeout.
        timeout = max(1, args.timeout // 2) if args.node_rank else args.timeout
        meeting = ["--nnodes", args.nnodes or 1, "--node_rank", args.node_rank or 0, "--master_addr", address,
                   "--master_port", port, "--rdzv_conf", f"timeout={timeout}"]
        if args.local_addr:
            meeting += ["--local_addr", args.local_addr]
    flags = add_launch_flags(Parser(add_help=False)).parse_known_args()[1]
    try:
        run.main([str(part) for part in (*meeting, "--nproc_per_node", len(args.device_list), "--max_restarts",
                                         args.max_restarts or 0, script, *flags)])
        return 0
    except ChildFailedError as error:
        fates = [f"rank {rank} " + (f"ended with status {failure.exitcode}" if failure.exitcode > 0 else
                                    f"was killed by {failure.signal_name()}")
                 for rank, failure in sorted(error.failures.items())]
        print(f"train.py: error: {', '.join(fates)}; what is saved, --resume auto goes on from", file=sys.stderr)
        status = error.get_first_failure()[1].exitcode
        return status if status > 0 else 128 - status  # 128 + signal, as shells report it
    except SignalException as error:
        return 128 + error.sigval
    except RuntimeError as error:  # a port in use, a machine that does not answer or does not come
        if not isinstance(error, DistError) and "EADDRINUSE" not in str(error):  # PyTorch 2.6's is a bare RuntimeError
            raise
        problem = (f"port {port} is in use on this machine; name another by --master_port" if "EADDRINUSE" in str(error)
                   else f"could not meet the other machines at {address}:{port} within {args.timeout} s, the --timeout "
                        f"({str(error).splitlines()[0]})")
        print(f"train.py: error: {problem}", file=sys.stderr)
        return 1
