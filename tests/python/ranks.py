# SPDX-License-Identifier: MIT
"""Runs functions on several processes of one torch.distributed group.

The processes are started once and wait for functions; a group is made for every call and meets in
a temporary file, so that no port is needed.
"""

import datetime
import multiprocessing
import os
import tempfile
import traceback

import torch

__all__ = ["Ranks"]

TIMEOUT = 120  # seconds that a function may take
PRELOAD = ["torch.distributed.fsdp", "torch.distributed.checkpoint.state_dict", "bitsandbytes"]


class Ranks:
    """A pool of processes: ``ranks(2, "gloo", function, ...)`` returns the result of each."""

    def __init__(self):
        # Forked from a process that has loaded torch and used neither threads nor a GPU.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)
        self._workers = []

    def __call__(self, world, backend, function, *args):
        """Returns what ``function(*args)`` returns on each rank.

        Args:
            world: Number of processes.
            backend: ``"gloo"``, or ``"nccl"`` with one GPU per process.
            function: A function of a module; it finds the group ready.
            args: What it is called with.

        Raises:
            AssertionError: The function raised on one of the processes.
        """
        while len(self._workers) < world:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            meeting = f"file://{folder}/store"
            for rank, (_, pipe) in enumerate(self._workers[:world]):
                pipe.send((rank, world, backend, meeting, function, args))
            answers = []
            for rank, (process, pipe) in enumerate(self._workers[:world]):
                if not pipe.poll(TIMEOUT if not answers else 5):
                    answers.append((False, f"rank {rank} does not answer"))
                    continue
                try:
                    answers.append(pipe.recv())
                except EOFError:
                    process.join(5)
                    answers.append((False, f"rank {rank} ended with {process.exitcode}"))
        failures = [f"--- rank {r}\n{text}" for r, (good, text) in enumerate(answers) if not good]
        if failures:
            self.close()  # the others may wait for each other
            raise AssertionError("\n".join(failures))
        return [result for _, result in answers]

    def _start(self):
        here, there = self._context.Pipe()
        process = self._context.Process(target=_serve, args=(there,), daemon=True)
        process.start()
        there.close()
        self._workers.append((process, here))

    def close(self):
        """Ends the processes."""
        for process, pipe in self._workers:
            pipe.close()
            process.terminate()
            process.join()
        self._workers = []


def _serve(pipe):
    torch.set_num_threads(1)
    while True:
        try:
            task = pipe.recv()
        except EOFError:
            return
        try:
            answer = (True, _run(*task))
        except BaseException:
            answer = (False, traceback.format_exc())
        pipe.send(answer)


def _run(rank, world, backend, meeting, function, args):
    if backend == "nccl":
        torch.cuda.set_device(rank)
    # What torchrun would set; some of torch's own code asks for it.
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
    torch.manual_seed(0)
    torch.distributed.init_process_group(
        backend,
        init_method=meeting,
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=60),
    )
    try:
        return function(*args)
    finally:
        torch.distributed.destroy_process_group()
