"""Builds the C extension `flexpert.kernels.cpu._ops` from C (setup.py names `ffibuilder`)."""

import re
from pathlib import Path

from cffi import FFI

_HERE = Path(__file__).parent
_EXCHANGE = _HERE.parents[1] / "comm" / "host"
_INCLUDED = (
    *(_HERE / name for name in ("packed.c", "few_rows.c", "program.c", "selection.c", "experts.c")),
    *(_HERE / name for name in ("pool.c", "tables.h")),
    _EXCHANGE / "exchange.h",
)


def declarations(source: str) -> str:
    """What Python sees of a C file: it stands between two marks, so that it is said only once."""
    found = re.search(r"/\* cdef: begin \*/(.*)/\* cdef: end \*/", source, re.DOTALL)
    if found is None:
        raise ValueError("a C file has lost its cdef marks")
    return found.group(1)


ffibuilder = FFI()
ffibuilder.cdef(declarations((_HERE / "tables.h").read_text(encoding="utf-8")))
ffibuilder.cdef(
    """
    const char *fx_instruction_set(void);
    int fx_grouped(const weight_table *table, intptr_t x, intptr_t begins, intptr_t ends,
                   intptr_t y, int dtype);
    int fx_linear(intptr_t x, intptr_t weight, intptr_t bias, intptr_t y, long rows, long k,
                  long n, int dtype);
    void fx_rms_norm(intptr_t x, intptr_t w, intptr_t y, long rows, long n, float eps, int early,
                     int dtype);
    int fx_paged_attention(intptr_t query, intptr_t key, intptr_t value, intptr_t key_cache,
                           intptr_t value_cache, intptr_t query_start, intptr_t context_len,
                           intptr_t block_tables, intptr_t slot_mapping, intptr_t sinks,
                           intptr_t out, long qs0, long qs1, long ks0, long ks1, long vs0,
                           long vs1, long sequences, long max_blocks, long block_size, long heads,
                           long kv_heads, long key_dim, long value_dim, long value_row, long window,
                           float scaling, float softcap, int dtype);
    void fx_set_threads(int threads);
    long fx_run(intptr_t program, long first, long last, intptr_t step);
    int fx_run_rows(const row_program *program, intptr_t source, intptr_t result, long rows);
    void fx_free_step(moe_step *moe);
    """
)
ffibuilder.set_source(
    "flexpert.kernels.cpu._ops",
    (_HERE / "ops.c").read_text(encoding="utf-8"),
    include_dirs=[str(_HERE), str(_EXCHANGE)],
    depends=[str(path) for path in _INCLUDED],
    # -Wno-psabi: vectors never cross a function boundary that is not inlined
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(Path(__file__).parents[2]), verbose=True)
