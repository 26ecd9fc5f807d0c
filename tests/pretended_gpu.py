"""A GPU that is none, for processes of its own: what Python does only where there is a GPU runs, on tensors of the CPU.

torch is told that `cuda:0` is there, and its streams, events and memory numbers stand still. A CUDA graph is a list of the
operations that were called while it was recorded: a replay calls them again on the memory of then, so that what Python
had decided by then stays as it was, as on a GPU; what would wait for the GPU raises, and leaves what torch 2.11 leaves of a
recording that failed: another stream, memory that can't be freed, and random numbers that no graph can draw.
"""

import contextlib
import functools
import gc
import itertools
import threading
import warnings
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU = torch.device("cuda", 0)
WAITS = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)


def here(value: Any) -> Any:
    "The CPU in place of the GPU"
    is_gpu = isinstance(value, torch.device | str) and str(value).startswith("cuda")
    return torch.device("cpu") if is_gpu else value


class OnThisGpu(TorchFunctionMode):
    "What is asked for on the GPU is made on the CPU"

    full = []  # one item for each row for which the GPU's memory will have no room

    def __torch_function__(self, function, types, arguments=(), options=None):
        if self.full and function is torch.empty and str((options or {}).get("device")) == "cuda:0":
            raise self.full.pop()
        options = {name: here(value) for name, value in (options or {}).items() if name != "pin_memory"}
        if function == torch.Tensor.is_cuda.__get__:
            return True
        if function is torch.device:
            return function(*arguments, **options)
        return function(*map(here, arguments), **options)


class Tape(TorchDispatchMode):
    "Notes the operations that are called, and what they made"

    def __init__(self):
        super().__init__()
        self.calls = []
        self.is_broken = False

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function in WAITS:
            self.is_broken = True
            raise RuntimeError("operation not permitted when stream is capturing")
        answer = function(*arguments, **(options or {}))
        if not function.is_view:
            self.calls.append((function, arguments, options or {}, tree_leaves(answer)))
        return answer

    @torch.no_grad()
    def play(self) -> None:
        "Call all of them again, into the memory of then"
        for function, arguments, options, made in self.calls:
            for old, new in zip(made, tree_leaves(function(*arguments, **options)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    "Does nothing: on a CPU all is done when it is called"

    made = 0  # cuBLAS would keep 32 MB for each; and torch has 32, so that the next one is the first again

    def __init__(self, device=None, priority=0):
        Stream.made += 1

    def wait_stream(self, other):
        pass

    def wait_event(self, event):
        pass


class Event:
    "Is there when it was asked three times"

    def __init__(self, blocking=False):
        self.questions = 0

    def record(self):
        self.questions = 0

    def query(self):
        self.questions += 1
        return self.questions > 3

    def synchronize(self):
        pass


class CUDAGraph:
    "A recording"

    unfinished = []  # pools of memory in which something is being recorded
    draws_in_recording = False  # as the generator believes, which all graphs share
    number = itertools.count(1)

    def __init__(self):
        self.tape = Tape()
        self.replays = 0

    def pool(self):
        return self.memory

    def replay(self):
        if CUDAGraph.draws_in_recording:
            raise RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
        self.replays += 1
        self.tape.play()


class graph:
    "Record what is called inside the block; a GPU would draw nothing meanwhile"

    def __init__(self, recording, pool=None, stream=None, capture_error_mode="global"):
        self.recording, self.side = recording, stream
        self.pool = recording.memory = pool or new_pool()
        self.block = contextlib.ExitStack()

    def __enter__(self):
        assert not gc.isenabled()  # what is freed while something is recorded breaks that, where it is a graph
        torch.cuda.empty_cache()
        self.stream = NOW.stream
        NOW.stream = self.side
        CUDAGraph.draws_in_recording = True
        CUDAGraph.unfinished.append(self.pool)
        self.block.enter_context(torch.random.fork_rng([]))
        self.block.enter_context(self.recording.tape)

    def __exit__(self, *error):
        self.block.close()
        if self.recording.tape.is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        end_recording(0, self.pool)
        CUDAGraph.draws_in_recording = False
        NOW.stream = self.stream


def new_pool() -> tuple[int, int]:
    "Memory for graphs"
    return 0, next(CUDAGraph.number)


def end_recording(device, pool) -> None:
    "Let memory be freed again"
    if pool not in CUDAGraph.unfinished:
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
    CUDAGraph.unfinished.remove(pool)


def empty_cache() -> None:
    "Free memory"
    if CUDAGraph.unfinished:
        raise RuntimeError("captures_underway.empty() INTERNAL ASSERT FAILED")


@functools.cache
def set_sync_debug_mode(mode):
    "Let what waits raise, which nothing does here; torch says once what it thinks of that"
    if mode:
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=2)


def utilization(device=None):
    "How busy it is: NVIDIA's library refuses to say so of a part of a GPU, with an error that is none of Python's own"
    raise NotMeasured("Not Supported")


class NotMeasured(Exception):
    "`NVMLError_NotSupported`"


class Now(threading.local):
    "The stream on which a thread works"

    stream = Stream()


NOW = Now()


@contextlib.contextmanager
def on(stream):
    "Inside the block the thread works on the stream"
    before, NOW.stream = NOW.stream, stream
    try:
        yield
    finally:
        NOW.stream = before


def attend(query, key, value, starts, _, longest, __, dropout, causal, ___, scale=None, **window):
    "FlashAttention's kernel, without a look at where texts start: each token sees those of its own text"
    assert not causal and not any(size not in (None, -1) for size in window.values())
    texts = torch.searchsorted(starts, torch.arange(len(query), dtype=starts.dtype), right=True)
    row = (x.transpose(0, 1)[None] for x in (query, key, value))
    mask = texts[:, None] == texts[None]
    out = torch.nn.functional.scaled_dot_product_attention(*row, mask, dropout, scale=scale)
    return (out[0].transpose(0, 1),)


def install() -> None:
    "Pretend from now on, in this thread and in those of executors"
    from concurrent.futures import ThreadPoolExecutor

    from gpuml.training import slots

    numbers = {"memory_allocated": 10**6, "max_memory_allocated": 2 * 10**6, "memory_reserved": 2 * 10**6}
    cuda, fork = torch.cuda, torch.random.fork_rng
    facts = {"is_available": True, "is_bf16_supported": True, "is_initialized": False, "get_device_name": "Pretended"}
    states = {"mem_get_info": (10**11, 10**11), "get_sync_debug_mode": 0}
    for name, value in {**numbers, **facts, **states}.items():
        setattr(cuda, name, lambda *_, value=value, **__: value)
    for name in ("synchronize", "set_device", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_: None)
    cuda.Stream, cuda.Event, cuda.CUDAGraph, cuda.graph = Stream, Event, CUDAGraph, graph
    cuda.stream, cuda.current_stream = on, lambda device=None: NOW.stream
    cuda.empty_cache, cuda.graph_pool_handle, cuda.utilization = empty_cache, new_pool, utilization
    cuda.set_sync_debug_mode = set_sync_debug_mode
    torch._C._cuda_endAllocateToPool, torch._C._cuda_releasePool = end_recording, lambda device, pool: None
    torch.random.fork_rng = lambda devices=None: fork([])
    slots.ThreadPoolExecutor = lambda most, name, begin: ThreadPoolExecutor(most, name, OnThisGpu().__enter__)
    torch.ops.aten._flash_attention_forward = attend
    torch.optim.Optimizer._accelerator_graph_capture_health_check = lambda self: None  # it asks the driver
    OnThisGpu().__enter__()
