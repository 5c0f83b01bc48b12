"""Builds the C extension `flexpert.kernels.cpu._ops` from C (setup.py names `ffibuilder`)."""

from pathlib import Path

from cffi import FFI

ffibuilder = FFI()
ffibuilder.cdef(
    """
    const char *fx_instruction_set(void);
    int fx_grouped_linear(intptr_t x, intptr_t weights, intptr_t biases, intptr_t begins,
                          intptr_t ends, intptr_t y, long groups, long k, long n, int dtype);
    int fx_grouped_packed(intptr_t x, intptr_t weights, intptr_t scales, intptr_t biases,
                          intptr_t begins, intptr_t ends, intptr_t y, long groups, long k, long n,
                          int dtype, int format, long shared);
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
    int fx_run(intptr_t program, long first, long last, intptr_t step);
    """
)
_HERE = Path(__file__).parent
ffibuilder.set_source(
    "flexpert.kernels.cpu._ops",
    (_HERE / "ops.c").read_text(encoding="utf-8"),
    include_dirs=[str(_HERE)],
    depends=[str(_HERE / name) for name in ("packed.c", "few_rows.c", "program.c", "pool.c")],
    # -Wno-psabi: vectors never cross a function boundary that is not inlined
    extra_compile_args=["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"],
)

if __name__ == "__main__":
    ffibuilder.compile(tmpdir=str(Path(__file__).parents[2]), verbose=True)
