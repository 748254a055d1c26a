"""Run a function in several processes joined in one gloo group; results and errors come back."""

import io
import multiprocessing
import queue as queue_module
import traceback
from datetime import timedelta

import torch
import torch.distributed as dist

_ANSWER_S = 100
"""Guards against hanging alone: more than the slowest machine needs."""


def _child(function, rank, world, path, queue):
    torch.set_num_threads(1)
    try:
        options = {"rank": rank, "world_size": world, "timeout": timedelta(seconds=_ANSWER_S)}
        dist.init_process_group("gloo", init_method=f"file://{path}", **options)
        result = io.BytesIO()  # bytes, because tensors in a queue need their sender alive
        torch.save(function(rank, world), result)
        queue.put((rank, result.getvalue(), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))
    finally:
        queue.close()
        queue.join_thread()


def run_processes(function, world, folder):
    """Results of ``function(rank, world)`` in the order of the ranks; raises with the traceback of a failed rank."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    path = folder / f"rendezvous-{world}"
    path.unlink(missing_ok=True)
    arguments = [(function, rank, world, path, queue) for rank in range(world)]
    children = [context.Process(target=_child, args=each, daemon=True) for each in arguments]
    for child in children:
        child.start()
    results, errors = {}, {}
    try:
        for _ in children:
            rank, result, error = queue.get(timeout=_ANSWER_S)
            results[rank], errors[rank] = result, error
    except queue_module.Empty:
        errors[-1] = f"a rank did not answer within {_ANSWER_S} seconds"
    for child in children:
        child.join(10)
        if child.is_alive():
            child.kill()
    failed = {rank: error for rank, error in errors.items() if error}
    if failed:
        raise AssertionError(f"ranks failed: {failed}")
    return [torch.load(io.BytesIO(results[rank])) for rank in range(world)]
