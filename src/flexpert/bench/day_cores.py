"""Services of `flexpert bench autoscale` at once, each with its client on cores of its own."""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec

from flexpert.bench.child_process import own_process
from flexpert.bench.day_plan import CapacityJob, Job
from flexpert.bench.day_service import JobOutcome, Note, do_job
from flexpert.bench.machine import usable_cores
from flexpert.errors import ConfigError, FlexpertError

BESIDE = 2  # cores of a service besides those of its ranks: the head's, and its client's

CoreGroups = Sequence[Collection[int]]


def divide_cores(services: int, ranks: int) -> CoreGroups:
    """As many cores for each service as there are.

    ranks: of each, at most.

    Raises: ConfigError: there are too few.
    """
    cores = usable_cores()
    least = ranks + BESIDE
    each = len(cores) // services
    if each < least:
        raise ConfigError(
            f"--at-once: {services} services of up to {ranks} ranks need {services * least} cores, "
            f"{least} each, and this process may use {len(cores)}: leave it out, or name fewer "
            "ranks with --max"
        )
    return [cores[number * each :][:each] for number in range(services)]


async def do_at_once(jobs: Sequence[Job], groups: CoreGroups, note: Note) -> list[JobOutcome]:
    """Each job in a process of its own on the cores of its group; as many groups as jobs, or more.

    Raises: FlexpertError: of the first that fails; the others are ended.
    """
    with tempfile.TemporaryDirectory() as folder:
        try:
            async with asyncio.TaskGroup() as together:
                tasks = [
                    together.create_task(_in_process(job, cores, Path(folder) / str(number), note))
                    for number, (job, cores) in enumerate(zip(jobs, groups, strict=False))
                ]
        except ExceptionGroup as failures:
            first = failures.exceptions[0]
            raise (first if isinstance(first, FlexpertError) else failures) from None
    return [task.result() for task in tasks]


async def _in_process(job: Job, cores: Collection[int], file: Path, note: Note) -> JobOutcome:
    name = "to measure" if isinstance(job, CapacityJob) else job.run
    file.write_bytes(msgspec.json.encode(job))
    done = file.with_suffix(".done")
    numbers = ",".join(map(str, sorted(cores)))
    command = [sys.executable, "-m", "flexpert.bench.day_cores", numbers, str(file), str(done)]
    async with own_process(command) as child:
        child.keep_lines(lambda line: note(f"{name}: {line}"))
        status = await child.end()
        if status:
            raise FlexpertError(f"{name}: exit status {status}{child.last_words()}")
    return msgspec.json.decode(done.read_bytes(), type=JobOutcome)


def main() -> None:
    """One job, on these cores: numbers of cores, the file of the job, the file for its outcome."""
    numbers, file, done = sys.argv[1:]
    os.sched_setaffinity(0, {int(number) for number in numbers.split(",")})
    job: Job = msgspec.json.decode(Path(file).read_bytes(), type=Job)
    try:
        outcome = asyncio.run(do_job(job, lambda line: print(line, flush=True)))
    except FlexpertError as error:
        sys.exit(str(error))
    Path(done).write_bytes(msgspec.json.encode(outcome))


if __name__ == "__main__":
    main()
