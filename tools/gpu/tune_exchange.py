"""Time variants of the exchange kernels, and single kernels, on one GPU.

    python tools/gpu/tune_exchange.py --ranks 1 --tokens 128 'pdl=True' 'width=2048,combine_warps=8'

Each variant is a list of fields of `Tuning`. "steady": µs a kernel in a graph of many of it.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

from flexpert.bench.comm.cuda.gpu_baselines import CudaExchangeBaseline
from flexpert.bench.comm.cuda.gpu_comm_rank import POOL, GpuRank
from flexpert.bench.comm.cuda.timing import Shots, captured, steady_times
from flexpert.bench.comm.ranks import Ranks, Settings
from flexpert.bench.comm.workload import Workload
from flexpert.comm.cuda.cuda_layout import read_report
from flexpert.comm.cuda.expert_major import ExpertMajor, pack


class TuneRank(GpuRank):
    def variant(self, fields: dict[str, Any], replays: int, single: bool) -> dict[str, float]:
        own = CudaExchangeBaseline(self._site("variant"), **fields)
        for turn in range(POOL):
            own.dispatch(turn)
            own.combine(turn)
        self._in_step()
        shots = Shots(self._clock.exchange.meet, self._device)
        self._in_step()
        shots.times((own.dispatch, own.combine), POOL, 1)
        self._in_step()
        found: dict[str, float] = {}
        for name, times in zip(
            ("dispatch", "combine"),
            shots.times((own.dispatch, own.combine), POOL, replays),
            strict=True,
        ):
            found[name] = sorted(times)[len(times) // 2]
        self._in_step()

        def pairs() -> None:
            for turn in range(16):
                own.dispatch(turn % POOL)
                own.combine(turn % POOL)

        def steady(run: Any, count: int = 16) -> float:
            graph = captured(run)
            self._in_step()
            steady_times(graph, count, 2)
            self._in_step()
            times = sorted(steady_times(graph, count, replays))
            return times[len(times) // 2]

        found["pair"] = steady(pairs)
        if single:
            e, sent = own.exchange, own._sent
            pool, work = self._pool, self._work
            into = ExpertMajor.empty(e, sent, work.ranks * work.tokens, work.ranks)
            parts = {
                "send_d": lambda t: e.send_dispatch(
                    pool[t].x, pool[t].expert_ids, pool[t].weights, own._table, fp8=own._fp8,
                    wait=True,
                ),
                "index": lambda _: e.index(sent),
                "send_c": lambda t: e.send_combine(
                    own._out, own._y[t], sent, reduce="rank", wait=True
                ),
                "pack": lambda _: pack(e, sent, into),
                "reduce": lambda t: e.reduce(own._out, own._y[t], sent, reduce="rank"),
            }  # fmt: skip
            self._in_step()
            launches = list(parts.values())
            for name, times in zip(parts, shots.times(launches, POOL, replays), strict=True):
                found[name] = sorted(times)[len(times) // 2]
            self._in_step()
            found["meets"] = steady(lambda: [e.meet() for _ in range(16)])
            found["stamps"] = steady(lambda: [shots._stamp() for _ in range(16)])
        if left_out := read_report(own.exchange.page):  # then these are times of fewer ranks
            raise RuntimeError(f"{fields}: {left_out}")
        own.close()
        return found


def fields_of(text: str) -> dict[str, Any]:
    """ "width=512,checks=False" → fields of `Tuning`."""
    pairs = (field.split("=") for field in text.split(",") if field)
    return {
        name: value == "True" if value in ("True", "False") else int(value) for name, value in pairs
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--tokens", default="128")
    parser.add_argument("--replays", type=int, default=30)
    parser.add_argument("--single", action="store_true")
    parser.add_argument("variants", nargs="*", default=[""])
    o = parser.parse_args()
    with Ranks(o.ranks, Settings("shm", "float32", 1, 1.0), TuneRank) as ranks:
        for tokens in o.tokens.split(","):
            work = Workload(
                ranks=o.ranks, tokens=int(tokens), hidden=7168, topk=8, experts=32,
                dtype="bfloat16", seed=0,
            )  # fmt: skip
            ranks.all("prepare", work)
            for text in o.variants:
                fields = fields_of(text)
                found = ranks.all("variant", fields, o.replays, o.single)
                print(
                    f"{o.ranks} ranks {tokens:>4} tokens {text or 'as is':50}"
                    + " ".join(f"{k} {max(f[k] for f in found):6.2f}" for k in found[0]),
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    import tune_exchange  # TuneRank must be in a module that the ranks can import

    sys.exit(tune_exchange.main())
