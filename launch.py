"""Starts a command once a card, on one machine or several, by PyTorch's torchrun: for --device_list and --nnodes.

It imports PyTorch only to launch, so that usage errors answer at once.
"""
import argparse
import dataclasses
import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

from cli import Parser, number, usable_cores
from errors import DeviceError, first_line

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}  # limit which devices a process sees
NOTES = "FCN8S_NOTES"  # names a folder of messages from the ranks to `launch` and to the ranks of a restart
BEGUN, STOPPED = "begun", "stopped"  # files there: the work folder is open; the number of the signal that stops
LAUNCHER = "FCN8S_LAUNCHER"  # the launcher's process id
DEFAULT_PORT = 29500  # torchrun's
DEFAULT_TIMEOUT = 600  # seconds, NCCL's; enough for rank 0 to write a checkpoint while the others wait
SAVING_TIME = 300  # seconds that a stopped run has to save a checkpoint; torchrun's own are 30


def under_torchrun(strict=True):
    """Whether torchrun started this process. Raises DeviceError if only a part of its variables is set, if `strict`."""
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing and (not strict or os.environ.get("WORLD_SIZE", "") in ("", "1")):
        return False
    wrong = [name for name in VARIABLES if name != "MASTER_ADDR" and not os.environ.get(name, "").isdecimal()]
    if missing or wrong:
        name = (missing or wrong)[0]
        raise DeviceError(f"WORLD_SIZE={os.environ.get('WORLD_SIZE')} is set as torchrun sets it, but {name} is "
                          f"'{os.environ.get(name, '')}'; start with torchrun or --device_list, or unset WORLD_SIZE")
    return True


def add_device_flags(parser):
    """The flags that say on which devices a command runs, and how its processes are started."""
    group = add_one_device_flags(parser.add_argument_group("devices, and the processes on them"))
    group.add_argument("--device_list", type=device_list, metavar="0,1,..",
                       help="several devices, a process for each, started by torchrun; of --device cpu the numbers "
                            "only count")
    group.add_argument("--timeout", type=number(1), metavar="SECONDS",
                       help=f"how long a process waits for the others before it ends (default: {DEFAULT_TIMEOUT})")
    return add_launch_flags(parser)


def add_one_device_flags(group):
    """The flags that say on which device a command runs. -> their group"""
    group.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"),
                       help="auto takes an NPU, else CUDA, else the CPU (default: %(default)s)")
    group.add_argument("--device_id", type=number(0), metavar="N",
                       help="which of the devices, counted from 0 (default: 0)")
    return group


def add_launch_flags(parser):
    """The flags that torchrun takes instead of the processes that it starts. -> the parser"""
    group = parser.add_argument_group("several machines (with --device_list)")
    group.add_argument("--nnodes", type=number(1), metavar="N", help="number of machines (default: 1)")
    group.add_argument("--node_rank", type=number(0), metavar="R", help="which of them this is (default: 0)")
    group.add_argument("--addr", "--master_addr", metavar="IP",
                       help="address of machine 0, where all processes meet (default: this machine)")
    group.add_argument("--master_port", type=number(1, 65535), metavar="P",
                       help=f"a free port there (default: {DEFAULT_PORT}; on one machine without --addr any)")
    group.add_argument("--local_addr", metavar="IP",
                       help="address of this machine; NPUs get it as HCCL_IF_IP")
    group.add_argument("--max_restarts", type=number(0), metavar="N",
                       help="how often to go on from the latest checkpoint after a process died (default: 0)")
    return parser


def device_list(text):
    """An argparse type: `0,1,2` -> ["0", "1", "2"]."""
    devices = [str(number(0)(part)) for part in text.split(",")]
    if len(set(devices)) < len(devices):
        raise argparse.ArgumentTypeError(f"takes each device once, not '{text}'")
    return devices


def check_devices(parser, args):
    """Flags about processes that do not go together are a usage error."""
    try:
        started = under_torchrun(strict=not args.device_list)  # with it, `launch` sets the variables
    except DeviceError as error:
        parser.error(str(error))
    launch_flags = vars(add_launch_flags(Parser(add_help=False)).parse_args([]))
    given = [flag for flag in launch_flags if getattr(args, flag) is not None]
    if args.timeout is not None and not (args.device_list or started):
        parser.error(f"--timeout {args.timeout} has no effect without --device_list: there is nobody to wait for")
    if started:
        for flag in [*given, *(["device_id"] if args.device_id is not None else [])]:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect under torchrun, which sets that itself")
        here = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if args.device_list and len(args.device_list) != here and NOTES not in os.environ:  # `launch` has counted
            parser.error(f"torchrun started {here} processes here for {len(args.device_list)} devices: "
                         + ",".join(args.device_list))
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
    args.timeout = args.timeout or DEFAULT_TIMEOUT


@dataclasses.dataclass(frozen=True)
class Launch:
    """On which devices and machines a command runs. The fields are the flags of these names."""
    device_list: list
    nnodes: int | None
    node_rank: int | None
    addr: str | None
    master_port: int | None
    local_addr: str | None
    max_restarts: int | None
    timeout: int


def is_launcher(devices):
    """Whether this process is to start one for each of the devices, as torchrun has not done it."""
    return devices is not None and not under_torchrun(strict=False)


def visible_devices(device, devices):
    """The devices to use, one process each; this and later processes see only these, counted from 0. None stays None.

    Where the environment names some already, those win: a scheduler or a user who sets that knows the machine.
    """
    if devices is None:
        return None
    kinds = [kind for kind in VISIBLE if device in ("auto", kind) or (device, kind) == ("gpu", "cuda")]
    for variable in (VISIBLE[kind] for kind in kinds):
        by_hand = os.environ.get(variable)
        if by_hand:
            if by_hand != ",".join(devices) and NOTES not in os.environ:  # `launch` has said it
                print(f"{Path(sys.argv[0]).name}: {variable}={by_hand} is set, it wins over --device_list "
                      f"{','.join(devices)}", file=sys.stderr)
            return by_hand.split(",")
    for kind in kinds:
        os.environ[VISIBLE[kind]] = ",".join(devices)
    return devices


def launch(how, script):
    """Runs `script` under torchrun, a process for each device, with the flags of this process. how: a Launch

    -> the exit status
    """
    with_own_level = "TORCH_CPP_LOG_LEVEL" in os.environ
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # else each failed try to connect prints a C++ stack
    interrupt = signal.getsignal(signal.SIGINT)
    if interrupt is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # an import may swallow KeyboardInterrupt, and the run would start
    from torch.distributed import DistError, run  # takes seconds, so not before the flags are checked
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    signal.signal(signal.SIGINT, interrupt)
    if not with_own_level:
        os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"  # of the ranks, which else warn when another one ends

    logging.disable(logging.CRITICAL)  # torchrun's own lines; the ranks say what is wrong
    prog = Path(script).name
    with tempfile.TemporaryDirectory(prefix="fcn8s-") as notes:
        set_environment(how, notes)
        flags = add_launch_flags(Parser(add_help=False)).parse_known_args()[1]
        try:
            run.main([*map(str, meeting(how)), "--nproc_per_node", str(len(how.device_list)), "--max_restarts",
                      str(how.max_restarts or 0), script, *flags])
        except ChildFailedError as error:
            return failed_status(error, prog)
        except SignalException as error:
            return 128 + error.sigval
        except RuntimeError as error:  # a port in use, a machine that does not answer or does not come
            if not isinstance(error, DistError) and "EADDRINUSE" not in str(error):
                raise
            print(f"{prog}: error: {meeting_problem(how, error)}", file=sys.stderr)
            return 1
        stopped = Path(notes, STOPPED)
        return 128 + int(stopped.read_text()) if stopped.is_file() else 0


def set_environment(how, notes):
    """What torchrun and the processes that it starts read from the environment."""
    os.environ[NOTES], os.environ[LAUNCHER] = notes, str(os.getpid())
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_TIME))  # old PyTorch always waits 30 s
    # torchrun would set 1; these are the cores that each process has, and it then warns about nothing.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // len(how.device_list))))
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # by nohup, which torchrun would undo
        os.environ.setdefault("TORCHELASTIC_SIGNALS_TO_HANDLE", "SIGTERM,SIGINT,SIGQUIT")
    if how.local_addr:
        os.environ.setdefault("HCCL_IF_IP", how.local_addr)


def meeting(how):
    """torchrun's flags about where the machines meet."""
    if not (how.addr or how.master_port):
        return ["--standalone"]
    # A machine tries to reach machine 0 twice, each time for the whole of torchrun's timeout.
    timeout = max(1, how.timeout // 2) if how.node_rank else how.timeout
    flags = ["--nnodes", how.nnodes or 1, "--node_rank", how.node_rank or 0, "--master_addr",
             how.addr or "127.0.0.1", "--master_port", how.master_port or DEFAULT_PORT,
             "--rdzv_conf", f"timeout={timeout}"]
    return flags + (["--local_addr", how.local_addr] if how.local_addr else [])


def meeting_problem(how, error):
    """Why torchrun could not start the processes, in words. PyTorch 2.6 raises a bare RuntimeError for a port in use,
    later ones a DistError with the same text; only that tells it."""
    port = how.master_port or DEFAULT_PORT
    if "EADDRINUSE" in str(error):
        return f"port {port} is in use on this machine; name another by --master_port"
    return (f"could not meet the other machines at {how.addr or '127.0.0.1'}:{port} within "
            f"{how.timeout} s, the --timeout ({first_line(error)})")


def failed_status(error, prog):
    """The exit status of a failed run. Reports ranks that were killed, which could not do so themselves. Not those
    killed by SIGTERM: torchrun sends it to the others when one fails."""
    all_killed = all(failure.exitcode < 0 for failure in error.failures.values())
    for rank, failure in sorted(error.failures.items()):
        if failure.exitcode < 0 and (all_killed or failure.exitcode != -signal.SIGTERM):
            print(f"{prog}: error: rank {rank} was killed by {failure.signal_name()}", file=sys.stderr)
    status = error.get_first_failure()[1].exitcode
    return status if status > 0 else 128 - status  # 128 + signal, as shells report it
