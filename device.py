"""Where a command runs: the device, and the ranks (one process a card): how they start, meet and fail together.

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
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

import cli

BACKENDS = {"npu": "hccl", "cuda": "nccl", "cpu": "gloo"}
KINDS = tuple(BACKENDS)  # in the order of --device auto
VISIBLE = {"npu": "ASCEND_RT_VISIBLE_DEVICES", "cuda": "CUDA_VISIBLE_DEVICES"}
HIDES = {kind: f" ({name} is '{os.environ[name]}')" for kind, name in VISIBLE.items() if name in os.environ}
VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT", "MASTER_ADDR")  # that torchrun sets
LAUNCH_FLAGS = ("nnodes", "node_rank", "master_addr", "master_port", "local_addr", "max_restarts")  # torchrun's own
HANDLED = "PET_SIGNALS_TO_HANDLE"  # torchrun's; `launch` sets it, so that its ranks know that they are
DEFAULT_ADDRESS, DEFAULT_PORT = "127.0.0.1", 29500  # torchrun's
DEFAULT_TIMEOUT = 600  # seconds, NCCL's; enough for rank 0 to write a checkpoint while the others wait


# ---- flags

def add_device_flags(parser):
    """The flags that say on which devices a command runs, and how its ranks are started."""
    group = add_one_device_flags(parser.add_argument_group("devices, and the processes on them"))
    group.add_argument("--device_list", type=cli.device_list, metavar="0,1,..",
                       help="several devices, a process for each, started by torchrun; with --device cpu only their "
                            "count matters")
    group.add_argument("--timeout", type=cli.number(1), metavar="SECONDS",
                       help=f"how long a process waits for the others before it ends (default: {DEFAULT_TIMEOUT})")
    machines = parser.add_argument_group("several machines (with --device_list)")
    machines.add_argument("--nnodes", type=cli.number(1), metavar="N", help="number of machines (default: 1)")
    machines.add_argument("--node_rank", type=cli.number(0), metavar="R", help="which of them this is (default: 0)")
    machines.add_argument("--master_addr", "--addr", metavar="IP",
                          help="address of machine 0, where all processes meet (default: this machine)")
    machines.add_argument("--master_port", type=cli.number(1, 65535), metavar="P",
                          help=f"a free port there (default: {DEFAULT_PORT}; on one machine without --master_addr any)")
    machines.add_argument("--local_addr", metavar="IP", help="address of this machine; NPUs get it as HCCL_IF_IP")
    machines.add_argument("--max_restarts", type=cli.number(0), metavar="N",
                          help="how often to restart after a process died (default: 0)")


def add_one_device_flags(group):
    """The flags that say on which device a command runs. -> the group"""
    group.add_argument("--device", default="auto", choices=("auto", "npu", "cuda", "gpu", "cpu"),
                       help="auto takes an NPU, else CUDA, else the CPU (default: %(default)s)")
    group.add_argument("--device_id", type=cli.number(0), metavar="N",
                       help="which of the devices, counted from 0 (default: 0; on an NPU ASCEND_DEVICE_ID's)")
    return group


def check_device_flags(parser, args):
    """Flags about processes that contradict each other, or how this process was started, are a usage error."""
    how = started(args)
    if how not in ("rank", "alone"):
        once = "srun --ntasks-per-node=1 " if how.startswith("SLURM") else ""
        parser.error(f"{how}: this would be one of several processes, each alone; start one on each machine, {once}"
                     f"python {cli.PROG} --device_list 0,1,.., with --nnodes --node_rank --master_addr if they are "
                     f"several (docs/several-cards.md), or unset {how.partition('=')[0]}")
    useless = {}  # {flag: why it has no effect}
    if args.device_list or how == "rank":
        useless["device_id"] = "with --device_list or torchrun: each process has its own device"
    else:
        useless["timeout"] = "without --device_list: there is nobody to wait for"
    if not args.device_list or how == "rank" and HANDLED not in os.environ:
        useless.update(dict.fromkeys(LAUNCH_FLAGS, "without --device_list, nor with torchrun, which has its own"))
    for flag, reason in useless.items():
        if getattr(args, flag) is not None:
            parser.error(f"--{flag} {getattr(args, flag)} has no effect {reason}")
    nodes, node_rank = args.nnodes or 1, args.node_rank or 0
    if node_rank >= nodes or nodes > 1 and None in (args.master_addr, args.node_rank):
        parser.error(f"--nnodes {nodes} takes --node_rank 0 to {nodes - 1}, and if above 1 needs it and --master_addr")
    args.timeout = args.timeout or DEFAULT_TIMEOUT


# ---- how this process was started

def started(args):
    """How this process was started: "rank", "alone" or, if it would be one of several that know nothing of each other,
    which variable says so.

    A rank is one of torchrun, which the user or `launch` called, or of anything else that sets all of torchrun's
    variables, say srun with a task a card. Variables of an operator, say of Kubernetes or Ascend's MindCluster, may
    count machines; the flag --nnodes overrules them.
    """
    values = {name: os.environ.get(name, "") for name in VARIABLES}
    wrong = [name for name, value in values.items() if not (value.isdecimal() or name == "MASTER_ADDR" and value)]
    if not wrong and (cli.TORCHRUN in os.environ or not args.nnodes and int(values["WORLD_SIZE"]) > 1):
        return "rank"
    if args.nnodes:
        return "alone"
    most = {"RANK": 0, "WORLD_SIZE": len(args.device_list or "1"), "PET_NNODES": 1}  # on a single machine
    if not values["RANK"]:
        most["SLURM_STEP_NUM_TASKS"] = 1
    for name, limit in most.items():
        value = os.environ.get(name, "")
        count = value.rpartition(":")[2]  # PET_NNODES may be 1:2
        if value and not (count.isdecimal() and int(count) <= limit):
            but = f", but {wrong[0]} is '{values[wrong[0]]}'" if wrong and name in values else ""
            return f"{name}={value} is set{but}"
    return "alone"


def must_launch(args):
    """True if this process must launch the ranks itself."""
    return args.device_list is not None and started(args) != "rank"


# ---- the device

def choose_device(name="auto", device_id=None, local_rank=None):
    """The torch.device for a --device flag: npu, cuda (or gpu), cpu; `auto` takes the first of these that exists.

    device_id: which of several; None: the one of the local rank. There is one CPU, which ranks share.
    local_rank: None if this process is no rank
    """
    name = kind_of(name)
    if name == "npu" and local_rank is None:
        device_id = cli.flag_or_env("--device_id", device_id, "ASCEND_DEVICE_ID")
    if device_id is None:
        device_id = 0 if name == "cpu" else local_rank or 0
    count = getattr(torch, name).device_count()
    if device_id >= count:
        raise cli.UserError(f"there is no {name} device {device_id}; there are {count}{HIDES.get(name, '')}, counted "
                            "from 0; change --device_id (on an NPU ASCEND_DEVICE_ID) or the number of processes")
    limit_threads()
    if name == "cpu":
        return torch.device("cpu")
    device = torch.device(name, device_id)
    getattr(torch, name).set_device(device)
    # Inf and NaN where numbers overflow; an Ascend 910A has none. torch_npu lacks the question in some versions.
    if name == "npu" and not getattr(getattr(torch.npu, "utils", None), "is_support_inf_nan", lambda: True)():
        raise cli.UserError(f"--device npu: {device} has no INF/NAN mode, without which overflows go unseen; it is not "
                            "supported, use --device cpu")
    return device


def kind_of(name):
    """The kind that a --device flag takes: npu, cuda or cpu. Raises UserError if there is none of them."""
    name = "cuda" if name == "gpu" else name
    if name == "auto":
        return next(kind for kind in KINDS if problem(kind) is None)
    if problem(name):
        raise cli.UserError(f"--device {name}: {problem(name)}; --device auto takes what exists")
    return name


@functools.cache  # a second import of a broken torch_npu raises another error
def problem(kind):
    """Why there is no device of a kind (npu, cuda or cpu), in one line; None if there is one."""
    if kind != "npu":
        return None if getattr(torch, kind).is_available() else "PyTorch sees no CUDA device" + HIDES.get(kind, "")
    if importlib.util.find_spec("torch_npu") is None:
        return "torch_npu is not installed"
    try:
        import torch_npu  # noqa: F401, registers the device type
    except Exception as error:  # without CANN's libraries it raises whatever its parts raise
        return f"torch_npu cannot be imported ({cli.first_line(error)})"
    return None if torch.npu.is_available() else "torch_npu sees no NPU" + HIDES.get(kind, "")


def limit_threads(processes=1):
    """Gives PyTorch no more threads than this process's share of the cores, which by itself counts the machine's."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(min(torch.get_num_threads(), max(1, cli.usable_cores() // processes)))


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
            raise cli.UserError(f"memory ran out ({cli.first_line(error)}); {memory_hint}") from None
        lost = isinstance(error, dist.DistError) or any(words in text.lower() for words in peers)
        if lost and dist.is_initialized() and "DataLoader" not in text:
            raise ConnectionError(None, f"rank {dist.get_rank()}: lost the other processes "
                                        f"({cli.first_line(error).split('. ')[0]})") from None
        raise


# ---- ranks

def visible_devices(kind, devices):
    """The devices to use, one rank each. On an accelerator this process and its children see these alone, from 0 on.

    If the environment names some, those win: a scheduler or a user who sets that knows the machine.
    """
    if kind not in VISIBLE:
        return devices  # ranks share the CPU
    listed = ",".join(devices)
    by_hand = os.environ.setdefault(VISIBLE[kind], listed)
    if by_hand != listed:
        print(f"{cli.PROG}: {VISIBLE[kind]}={by_hand} is set, it wins over --device_list {listed}", file=sys.stderr)
    return by_hand.split(",")


def launch(args, script):
    """Runs `script` under torchrun with this command's flags, a rank for each of --device_list. -> exit status

    After a signal torchrun raises its SignalException, see cli.run.
    """
    kind = kind_of(args.device)
    devices = visible_devices(kind, args.device_list)
    if kind == "npu":
        cli.flag_or_env("--device_list", ",".join(args.device_list), "ASCEND_DEVICE_ID")
    count = len(devices) if kind == "cpu" else getattr(torch, kind).device_count()
    if count < len(devices):
        source = "--device_list" if devices == args.device_list else VISIBLE[kind]
        raise cli.UserError(f"{count} of the {kind} devices {','.join(devices)} exist; change {source}")
    os.environ["TORCH_CPP_LOG_LEVEL"] = os.environ["TORCH_CPP_LOG_LEVEL"].replace("FATAL", "ERROR")  # of the ranks
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", str(cli.SAVING_TIME))  # PyTorch 2.6 always waits 30 s
    # torchrun would set 1. These are the cores that each rank has.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cli.usable_cores() // len(devices))))
    for name in [name for name in os.environ if name.startswith("PET_")]:
        del os.environ[name]  # an operator's, for torchrun; flags here would not win over all of them
    stops = [stop.name for stop in cli.STOP_SIGNALS if signal.getsignal(stop) is not signal.SIG_IGN]  # as by nohup
    os.environ[HANDLED] = ",".join([*stops, "SIGQUIT"])
    logging.disable(logging.CRITICAL)  # torchrun's report; the ranks say what is wrong
    if args.local_addr:
        os.environ.setdefault("HCCL_IF_IP", args.local_addr)
    own = [f"--{flag}={getattr(args, flag)}" for flag in LAUNCH_FLAGS if getattr(args, flag) is not None]
    if not (args.master_addr or args.master_port):
        own += ["--standalone", f"--local_addr={DEFAULT_ADDRESS}"]  # the host's name may not resolve
    # A machine tries to reach machine 0 twice, each time for the whole of torchrun's timeout.
    timeout = max(1, args.timeout // 2) if args.node_rank else args.timeout
    address, port = args.master_addr or DEFAULT_ADDRESS, args.master_port or DEFAULT_PORT
    if (args.nnodes or 1) > 1:
        print(f"waiting for {args.nnodes} machines at {address}:{port}, at most {args.timeout} s")
    with tempfile.TemporaryDirectory(prefix="fcn8s-") as logs:
        try:
            torchrun.main([*own, f"--rdzv_conf=timeout={timeout}", f"--log_dir={logs}",
                           f"--nproc_per_node={len(devices)}", script, *sys.argv[1:]])
        except ChildFailedError as error:
            return status_of(error.failures)
        except dist.DistError as error:  # a port in use, a machine that does not answer or does not come
            in_use = f"port {port} is in use on this machine; name another by --master_port"
            alone = (f"could not meet the other machines at {address}:{port} within {args.timeout} s, the --timeout "
                     f"({cli.first_line(error)})")
            raise cli.UserError(in_use if "EADDRINUSE" in str(error) else alone) from None
    return 0


def status_of(failures):
    """The exit status of a run whose ranks failed. Reports those that were killed, which could not do so themselves.

    failures: {rank: torchrun's ProcessFailure}. Their timestamps are whole seconds, too coarse to tell the first.
    """
    statuses = []
    for rank, failure in sorted(failures.items()):
        code = failure.exitcode
        if code < 0 and -code not in cli.STOP_SIGNALS:
            print(f"{cli.PROG}: error: rank {rank} was killed by {failure.signal_name()}; if memory ran out, lower "
                  "--batch_size or --workers", file=sys.stderr)
            code = 128 - code
        statuses.append(code)
    # A stop comes first, which its peers fail of; then a crash. Negative: torchrun's SIGTERM, to a failed rank's peers.
    status = max([status for status in statuses if status - 128 in cli.STOP_SIGNALS] or statuses)
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

    def largest(self, number):
        """The largest of all ranks' whole numbers, in every rank. Waits for them, and for the device."""
        if self.count == 1:
            return number
        tensor = torch.tensor([number], device=self.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return int(tensor)

    def leave(self):
        """Ends the process group. -> 0, the exit status"""
        if self.count > 1:
            dist.destroy_process_group()
        return 0


def join_ranks(args):
    """Chooses this process's device. Under torchrun, waits for the other ranks, at most --timeout seconds. -> Ranks"""
    if started(args) != "rank":
        return Ranks(choose_device(args.device, args.device_id))
    if args.device_list:  # `launch` has set this; torchrun called by hand has not
        for variable in VISIBLE.values():
            os.environ.setdefault(variable, ",".join(args.device_list))
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
    except (RuntimeError, ValueError) as error:  # the second: of a port beyond 65535
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ConnectionError(None, f"rank {rank} could not meet the other processes at {where} within {args.timeout} "
                                    f"s ({cli.first_line(error)})") from None
    finally:
        signal.signal(signal.SIGINT, interrupt)
    mine = os.getpid(), socket.gethostname(), os.sched_getaffinity(0)  # srun may give each task cores of its own
    ranks = [None] * count
    dist.all_gather_object(ranks, mine)
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or sum(other[1:] == mine[1:] for other in ranks))
    limit_threads(here)
    return Ranks(device, rank, count, local_rank, here, tuple(pid for pid, *_ in ranks[rank - local_rank:][:here]))
