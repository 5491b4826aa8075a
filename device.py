"""Where a command runs: the device, and the ranks (one process a card): how they start, join, stop and fail together.

torchrun, called by the user or by `launch`, starts the ranks. When one fails, it ends the others, and may restart all.
docs/reliability.md says what was tried.
"""
import contextlib
import dataclasses
import functools
import importlib.util
import logging
import os
import platform
import signal
import socket
import sys
import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from cli import (
    PARENT,
    PROG,
    STOP_SIGNALS,
    Output,
    Parser,
    UserError,
    device_list,
    first_line,
    first_to,
    flag_or_env,
    number,
    usable_cores,
)

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
KINDS = tuple(BACKENDS)  # in the order of --device auto
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES", "gpu": "CUDA_VISIBLE_DEVICES"}
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # that torchrun sets
TORCHRUN = "TORCHELASTIC_RUN_ID"  # it sets this, too, and nothing else does
RANKS = ("torchrun", "tasks")  # see `started`
DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 29500  # torchrun's
DEFAULT_TIMEOUT = 600  # seconds, NCCL's; enough for rank 0 to write a checkpoint while the others wait
SAVING_TIME = 300  # seconds that a run has to save after a signal, before it is killed; torchrun's own are 30
STOP_INTERVAL = 10  # iterations between two checks of the other ranks' signals on an accelerator


# ---- flags

def add_device_flags(parser):
    """The flags that say on which devices a command runs, and how its ranks are started."""
    group = add_one_device_flags(parser.add_argument_group("devices, and the processes on them"))
    group.add_argument("--device_list", type=device_list, metavar="0,1,..",
                       help="several devices, a process for each, started by torchrun; with --device cpu only their "
                            "count matters")
    group.add_argument("--timeout", type=number(1), metavar="SECONDS",
                       help=f"how long a process waits for the others before it ends (default: {DEFAULT_TIMEOUT})")
    add_launch_flags(parser)


def add_one_device_flags(group):
    """The flags that say on which device a command runs. -> the group"""
    group.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"),
                       help="auto takes an NPU, else CUDA, else the CPU (default: %(default)s)")
    group.add_argument("--device_id", type=number(0), metavar="N",
                       help="which of the devices, counted from 0 (default: 0; on an NPU ASCEND_DEVICE_ID's)")
    return group


def add_launch_flags(parser):
    """torchrun's own flags for the launcher, which the ranks do not get. -> the parser"""
    group = parser.add_argument_group("several machines (with --device_list)")
    group.add_argument("--nnodes", type=number(1), metavar="N", help="number of machines (default: 1)")
    group.add_argument("--node_rank", type=number(0), metavar="R", help="which of them this is (default: 0)")
    group.add_argument("--master_addr", "--addr", metavar="IP",
                       help="address of machine 0, where all processes meet (default: this machine)")
    group.add_argument("--master_port", type=number(1, 65535), metavar="P",
                       help=f"a free port there (default: {DEFAULT_PORT}; on one machine without --master_addr any)")
    group.add_argument("--local_addr", metavar="IP",
                       help="address of this machine; NPUs get it as HCCL_IF_IP")
    group.add_argument("--max_restarts", type=number(0), metavar="N",
                       help="how often to restart after a process died (default: 0)")
    return parser


def check_device_flags(parser, args):
    """Flags about processes that contradict each other, or how this process was started, are a usage error."""
    how, why = started(args)
    if how in ("srun", "operator"):
        once = "srun --ntasks-per-node=1 " if how == "srun" else ""
        parser.error(f"{why}: this would be one of several processes, each alone; start one on each machine, {once}"
                     f"python {PROG} --device_list 0,1,.., with --nnodes --node_rank --master_addr if they are several "
                     f"(docs/several-cards.md), or unset {why.partition('=')[0]}")
    useless = {}  # {flag: why it has no effect}
    if args.device_list or how in RANKS:
        useless["device_id"] = "with --device_list or torchrun: each process has its own device"
    else:
        useless["timeout"] = "without --device_list: there is nobody to wait for"
    if not must_launch(args):
        launch_flags = vars(add_launch_flags(Parser(add_help=False)).parse_args([]))
        useless.update(dict.fromkeys(launch_flags, "without --device_list, nor with torchrun, which has its own"))
    for flag, reason in useless.items():
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect {reason}")
    nodes, node_rank = args.nnodes or 1, args.node_rank or 0
    if node_rank >= nodes or nodes > 1 and None in (args.master_addr, args.node_rank):
        parser.error(f"--nnodes {nodes} takes --node_rank 0 to {nodes - 1}, and if above 1 needs it and --master_addr")
    args.timeout = args.timeout or DEFAULT_TIMEOUT


# ---- how this process was started

def started(args):
    """How this process was started: (how, the variable that says so or ""). The flag --nnodes overrules an operator.

    torchrun: as a rank, by torchrun, which the user or `launch` called
    tasks: as a rank, by anything else that sets all of torchrun's variables, say srun with a task a card
    srun: as one of several tasks that know nothing of each other
    operator: on one of several machines that an operator counts, say of Kubernetes or Ascend's MindCluster
    alone: in any other way
    """
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    wrong = [name for name, value in values.items() if not (value.isdecimal() or name == "MASTER_ADDR" and value)]
    if TORCHRUN in os.environ:
        return "torchrun", ""
    if args.nnodes:
        return "alone", ""
    if not wrong and int(values["WORLD_SIZE"]) > 1:
        return "tasks", ""
    most = {"RANK": 0, "WORLD_SIZE": len(args.device_list or "1"), "PET_NNODES": 1}  # on a single machine
    if not values["RANK"]:
        most["SLURM_STEP_NUM_TASKS"] = 1
    for name, limit in most.items():
        value = os.environ.get(name, "")
        count = value.rpartition(":")[2]  # PET_NNODES may be 1:2
        if value and not (count.isdecimal() and int(count) <= limit):
            but = f", but {wrong[0]} is '{values[wrong[0]]}'" if wrong and name in values else ""
            return "srun" if name.startswith("SLURM") else "operator", f"{name}={value} is set{but}"
    return "alone", ""


def must_launch(args):
    """True if this process must launch the ranks itself."""
    return args.device_list is not None and started(args)[0] not in RANKS


# ---- the device

def choose_device(name="auto", device_id=None, local_rank=None):
    """The torch.device for a --device flag: npu, cuda (or gpu), cpu; `auto` takes the first of these that exists.

    device_id: which of several; None: the one of the local rank. There is one CPU, which ranks share.
    local_rank: None if this process is no rank
    """
    name = kind_of(name)
    if name == "npu" and local_rank is None:
        device_id = flag_or_env("--device_id", device_id, "ASCEND_DEVICE_ID")
    if device_id is None:
        device_id = 0 if name == "cpu" else local_rank or 0
    count = getattr(torch, name).device_count()
    if device_id >= count:
        raise UserError(f"there is no {name} device {device_id}; there are {count}, counted from 0; change --device_id "
                        "(on an NPU ASCEND_DEVICE_ID) or the number of processes")
    limit_threads()
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name, device_id)
    getattr(torch, name).set_device(device)
    # Inf and NaN where numbers overflow; an Ascend 910A has none. torch_npu lacks the question in some versions.
    if name == "npu" and not getattr(getattr(torch.npu, "utils", None), "is_support_inf_nan", lambda: True)():
        raise UserError(f"--device npu: {device} has no INF/NAN mode, without which overflows go unseen; it is not "
                        "supported, use --device cpu")
    return device


def kind_of(name):
    """The kind that a --device flag takes: npu, cuda or cpu. Raises UserError if there is none of them."""
    name = "cuda" if name == "gpu" else name
    if name == "auto":
        return next(kind for kind in KINDS if problem(kind) is None)
    if problem(name):
        raise UserError(f"--device {name}: {problem(name)}; --device auto takes what exists")
    return name


@functools.cache  # a second import of a broken torch_npu raises another error
def problem(kind):
    """Why there is no device of a kind (npu, cuda or cpu), in one line; None if there is one."""
    if kind != "npu":
        return None if getattr(torch, kind).is_available() else "PyTorch sees no CUDA device"
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        import torch_npu  # noqa: F401, registers the device type
    except Exception as error:  # without CANN's libraries it raises whatever its parts raise
        return f"torch_npu cannot be imported ({first_line(error)})"
    return None if torch.npu.is_available() else "torch_npu sees no NPU"


def limit_threads(processes=1):
    """Gives PyTorch no more threads than this process's share of the cores, which by itself counts the machine's."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, usable_cores() // processes)))


def describe(device, asked):
    """A description of the device. asked: the --device flag; for `auto` it says why the earlier kinds were skipped."""
    facts = [f"{platform.machine()}, {torch.get_num_threads()} threads" if device.type == "cpu" else
             getattr(torch, device.type).get_device_name(device)]
    if asked == "auto":
        facts += [f"no {kind}: {problem(kind)}" for kind in KINDS[:KINDS.index(device.type)]]
    return f"{device} ({'; '.join(facts)})"


@contextlib.contextmanager
def readable_errors(memory_hint):
    """Turns an out-of-memory error into a UserError, and that of a collective operation whose peers are gone into a
    ConnectionError. On a CPU, and in some versions of torch_npu, both are bare RuntimeErrors, told by their texts.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        memory = ("DefaultCPUAllocator: can't allocate memory", "NPU out of memory")
        peers = ("gloo", "connection", "socket", "hccl", "timed out")
        if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(words in text for words in memory):
            raise UserError(f"memory ran out ({first_line(error)}); {memory_hint}") from None
        lost = isinstance(error, dist.DistError) or any(words in text.lower() for words in peers)
        if lost and dist.is_initialized() and "DataLoader" not in text:
            raise ConnectionError(None, f"rank {dist.get_rank()}: lost the other processes "
                                        f"({first_line(error).split('. ')[0]})") from None
        raise


# ---- ranks

def visible_devices(device, devices):
    """The devices to use, one rank each. This process and its children see only these, counted from 0.

    If the environment names some, those win: a scheduler or a user who sets that knows the machine.
    """
    listed = ",".join(devices)
    variables = [variable for kind, variable in VISIBLE.items() if device in ("auto", kind)]
    for variable in variables:
        by_hand = os.environ.get(variable)
        if by_hand:
            if by_hand != listed:
                print(f"{PROG}: {variable}={by_hand} is set, it wins over --device_list {listed}", file=sys.stderr)
            return by_hand.split(",")
    os.environ.update(dict.fromkeys(variables, listed))
    return devices


def launch(args, script):
    """Runs `script` under torchrun with this command's flags, a rank for each of --device_list. -> exit status"""
    kind, devices = kind_of(args.device), visible_devices(args.device, args.device_list)
    if kind == "npu":
        flag_or_env("--device_list", ",".join(args.device_list), "ASCEND_DEVICE_ID")
    count = len(devices) if kind == "cpu" else getattr(torch, kind).device_count()
    if count < len(devices):
        raise UserError(f"{count} of the {kind} devices {','.join(devices)} exist; change --device_list")
    os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ["TORCH_CPP_LOG_LEVEL"].replace("FATAL", "ERROR")  # of the ranks
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(SAVING_TIME))  # PyTorch 2.6 always waits 30 s
    # torchrun would set 1. These are the cores that each rank has.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // len(devices))))
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # an operator's, for torchrun; flags here would not win over all of them
    stops = [stop.name for stop in STOP_SIGNALS if signal.getsignal(stop) is not signal.SIG_IGN]  # as by nohup
    os.environ["PET_SIGNALS_TO_HANDLE"] = ",".join([*stops, "SIGQUIT"])
    logging.disable(logging.CRITICAL)  # torchrun's report; the ranks say what is wrong
    if args.local_addr:
        os.environ.setdefault("HCCL_IF_IP", args.local_addr)
    own, flags = add_launch_flags(Parser(add_help=False)).parse_known_args()
    own = [f"--{flag}={value}" for flag, value in vars(own).items() if value is not None]
    if devices != args.device_list:
        flags += ["--device_list", ",".join(devices)]
    if not (args.master_addr or args.master_port):
        own += ["--standalone", f"--local_addr={args.local_addr or DEFAULT_ADDRESS}"]  # the host's name may not resolve
    # A machine tries to reach machine 0 twice, each time for the whole of torchrun's timeout.
    timeout = max(1, args.timeout // 2) if args.node_rank else args.timeout
    address, port = args.master_addr or DEFAULT_ADDRESS, args.master_port or DEFAULT_PORT
    if (args.nnodes or 1) > 1:
        print(f"waiting for {args.nnodes} machines at {address}:{port}, at most {args.timeout} s", flush=True)
    with tempfile.TemporaryDirectory(prefix="fcn8s-") as logs:
        try:
            torchrun.main([*own, f"--rdzv_conf=timeout={timeout}", f"--log_dir={logs}",
                           f"--nproc_per_node={len(devices)}", script, *flags])
        except SignalException as stopped:
            return 128 + stopped.sigval
        except ChildFailedError as error:
            return status_of(error.failures)
        except RuntimeError as error:
            if "EADDRINUSE" in str(error):
                raise UserError(f"port {port} is in use on this machine; name another by --master_port") from None
            if isinstance(error, dist.DistError):  # a machine that does not answer or does not come
                raise UserError(f"could not meet the other machines at {address}:{port} within {args.timeout} s, the "
                                f"--timeout ({first_line(error)})") from None
            raise
    return 0


def status_of(failures):
    """The exit status of a run whose ranks failed. Reports those that were killed, which could not do so themselves.

    failures: {rank: torchrun's ProcessFailure}. Their timestamps are whole seconds, too coarse to tell the first.
    """
    statuses = []
    for rank, failure in sorted(failures.items()):
        code = failure.exitcode
        if code < 0 and -code not in STOP_SIGNALS:
            print(f"{PROG}: error: rank {rank} was killed by {failure.signal_name()}; if memory ran out, lower "
                  "--batch_size or --workers", file=sys.stderr)
            code = 128 - code
        statuses.append(code)
    # A stop comes first, which its peers fail of; then a crash. Negative: torchrun's SIGTERM, to a failed rank's peers.
    status = max([status for status in statuses if status - 128 in STOP_SIGNALS] or statuses)
    return status if status > 0 else 128 - status


@dataclasses.dataclass(frozen=True)
class Ranks:
    """The processes of one run, and this one's place among them; alone it is rank 0 of 1.

    count: the world size; here: how many of them share this machine's cores; local_rank: which of those this is
    pids: their process ids, under torchrun
    """
    device: torch.device
    rank: int = 0
    count: int = 1
    local_rank: int = 0
    here: int = 1
    pids: tuple = ()

    def share(self, value):
        """Broadcasts rank 0's value. -> it, in every rank"""
        values = [value]
        if self.count > 1:
            dist.broadcast_object_list(values, 0)
        return values[0]

    def once_a_machine(self, work):
        """Calls `work` in the first rank of each machine; the others wait. -> rank 0's result, in every rank"""
        return self.share(work() if self.local_rank == 0 else None)

    def sum(self, tensor):
        """The sum of a tensor over all ranks, in place. -> the tensor"""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    def leave(self):
        """Ends the process group. -> 0, the exit status"""
        if self.count > 1:
            dist.destroy_process_group()
        return 0


def join_ranks(args):
    """Chooses this process's device. Under torchrun, waits for the other ranks, at most --timeout seconds. -> Ranks"""
    how, _ = started(args)
    if how not in RANKS:
        return Ranks(choose_device(args.device, args.device_id))
    if args.device_list:
        visible_devices(args.device, args.device_list)
    rank, local_rank, count = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    device = choose_device(args.device, local_rank=local_rank)
    if count == 1:
        return Ranks(device)
    limit = timedelta(seconds=args.timeout)
    interrupt = signal.signal(signal.SIGINT, signal.SIG_DFL)  # a Python handler does not run in the C++ rendezvous
    try:
        # After a restart, gloo would wait on the addresses of the attempt before: each attempt has a prefix.
        store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"),
                                 next(dist.rendezvous("env://", timeout=limit))[0])
        dist.init_process_group(BACKENDS[device.type], store=store, rank=rank, world_size=count, timeout=limit)
    except RuntimeError as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(None, f"rank {rank} could not meet the other processes at {where} within {args.timeout} "
                                    f"s ({first_line(error)})") from None
    signal.signal(signal.SIGINT, interrupt)
    mine = os.getpid(), socket.gethostname(), os.sched_getaffinity(0)  # srun may give each task cores of its own
    ranks = [None] * count
    dist.all_gather_object(ranks, mine)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or sum(other[1:] == mine[1:] for other in ranks))
    limit_threads(here)
    return Ranks(device, rank, count, local_rank, here, tuple(pid for pid, *_ in ranks[rank - local_rank:][:here]))


class Stop:
    """STOP_SIGNALS, unless they are ignored, as SIGHUP by nohup. A context that restores their handlers.

    At first, and during an evaluation, a signal ends the process at once: everything is saved. While `deferred`,
    `agreed` tells all ranks to stop after the same iteration.
    """

    def __init__(self, ranks):
        self.ranks, self.number, self.deferred, self.trains, self.before = ranks, 0, False, False, {}

    def __enter__(self):
        for stop in STOP_SIGNALS:
            if signal.getsignal(stop) is not signal.SIG_IGN:
                self.before[stop] = signal.signal(stop, self.record)
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, UserError):
            error.late = self.trains
        signal.alarm(0)
        for stop, handler in self.before.items():
            signal.signal(stop, handler)

    def record(self, number, frame):
        """The signal handler. A second Ctrl-C ends the process at once; Slurm sends SIGTERM twice."""
        Output.stopping = True
        if not self.deferred or number == signal.SIGINT == self.number:
            for stop in self.before:
                signal.signal(stop, signal.SIG_IGN)  # one is enough
            sys.exit(self.status(number))
        self.number = number
        signal.alarm(SAVING_TIME)  # ends a run that cannot stop, say because a dead file server blocks the loader

    @contextlib.contextmanager
    def at_once(self):
        """A context for an evaluation, before which all is saved: a signal ends the process at once."""
        self.deferred = False
        if self.number:
            sys.exit(self.status(self.number))
        yield
        self.deferred = True

    def agreed(self, iteration):
        """The signal on which the run stops after this iteration, else 0; the same in every rank."""
        self.trains = True
        if self.ranks.count == 1:
            return self.number
        if self.ranks.device.type != "cpu" and iteration % STOP_INTERVAL:
            return 0  # asking waits for the device
        number = torch.tensor([self.number], device=self.ranks.device)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return int(number)

    def leave(self, number):
        """Ends all ranks together, once rank 0 has saved. -> the exit status"""
        status = self.status(number) if self.ranks.local_rank == 0 else 128 + number
        self.ranks.sum(torch.zeros(1, device=self.ranks.device)).item()  # a barrier: waits for the device, too
        return status

    def status(self, number):
        """The exit status after a signal. Passes it to torchrun first, which then does not restart the ranks.

        If a rank has died, the signal is torchrun's, to the peers of a failed rank, and it may restart them.
        """
        if TORCHRUN in os.environ:
            if not all(os.path.exists(f"/proc/{pid}") for pid in self.ranks.pids):
                return 1
            # Once a machine: torchrun, which may have it from the user already, leaves its ranks alone at the third.
            if os.getppid() == PARENT and first_to("stopped"):
                os.kill(PARENT, number)
        return 128 + number
