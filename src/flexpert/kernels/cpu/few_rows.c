/* A few rows times packed weights, which come apart in registers. Included by packed.c.
 *
 * Weights that are unpacked into memory first cost more time than their bytes save. Here a block of
 * 32 becomes the two vectors that `dot_tile` makes of 32 bf16, even and odd elements, or the one that
 * its vdpbf16ps takes, and the sums are `dot_tile`'s, in its order: a row's bits are those of the
 * other way, and of the dequantized matrix.
 */

enum {
    FEW = 4,   /* rows at once */
    MOST = 8,  /* up to which this is faster: what lies in memory is shared by more */
    SPAN = 32, /* blocks of a row whose scales lie ready */
    READY = 8, /* groups, of int4 */
};

typedef struct {
    const char *x[FEW];
    const uint8_t *w;     /* the first of 16 weight rows, `stride` bytes apart */
    const char *scales;   /* of that row */
    long k, stride, shared; /* shared: as in `packed_args` */
} few_args;

/* What scales of 16 rows and a span of blocks come to. */
typedef union {
    uint32_t add[16][SPAN];  /* MXFP4: to the values */
    float values[READY][16][16]; /* int4: of the codes */
    uint16_t pairs[READY][16][32] __attribute__((aligned(64))); /* the same as bf16, twice */
    float by[16];            /* int8 */
} few_scales;

/* 0: some scale does not add up, see `adds_up`. */
AVX512 INLINE int few_mxfp4(const few_args *a, long begin, long blocks, few_scales *to) {
    const long all = a->k / 32;
    __mmask16 beyond = 0;
    for (int o = 0; o < 16; o++)
        UNROLL for (int b = 0; b < SPAN; b += 16) {
            const long left = blocks - b;
            const __mmask16 live = left >= 16 ? 0xffff : left > 0 ? (__mmask16)((1u << left) - 1) : 0;
            const __m512i e = _mm512_cvtepu8_epi32(
                _mm_mask_loadu_epi8(_mm_set1_epi8(127), live, a->scales + o * all + begin + b));
            beyond |= _mm512_cmpgt_epu32_mask(_mm512_sub_epi32(e, _mm512_set1_epi32(2)),
                                              _mm512_set1_epi32(250));
            _mm512_storeu_si512(to->add[o] + b,
                                _mm512_slli_epi32(_mm512_sub_epi32(e, _mm512_set1_epi32(127)), 23));
        }
    return beyond == 0;
}

AVX512 INLINE void few_int4(const few_args *a, long begin, long blocks, few_scales *to) {
    const long first = begin * 32 / a->shared, groups = (blocks * 32 + a->shared - 1) / a->shared;
    const uint32_t *scales = (const uint32_t *)a->scales + first;
    for (int o = 0; o < 16; o++, scales += a->k / a->shared)
        for (long g = 0; g < groups; g++)
            _mm512_storeu_ps(to->values[g][o], int4_values(_mm512_set1_epi32((int)scales[g])));
}

#define BF16_512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

/* acc[r * outs + j] of `rows` rows with weight rows first … first + outs - 1, over some blocks.
 * Memory that the next 16 weight rows need is fetched meanwhile. */
#define FEW_TILE(NAME, TARGET, EACH)                                                               \
    TARGET INLINE void NAME(const few_args *a, long begin, long blocks, const few_scales *scales,  \
                            int first, int rows, int outs, int format, f32x16 *acc) {              \
        const long block = format == INT8 ? 32 : 16, ahead = 16 * a->stride;                       \
        const __m512i table = _mm512_slli_epi32(                                                   \
            _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)E2M1)), 16);                 \
        const __m512i high = _mm512_set1_epi32((int)0xffff0000u);                                  \
        const uint8_t *w = a->w + first * a->stride + block * begin;                               \
        const long per = format == INT4 ? a->shared / 32 : 1;                                      \
        (void)table, (void)per;                                                                    \
        for (long b = 0; b < blocks; b++, w += block) {                                            \
            const long group = format == INT4 ? b / per : 0;                                       \
            (void)group;                                                                           \
            __m512 xe[FEW], xo[FEW];                                                               \
            if (b % (64 / block) == 0)                                                             \
                UNROLL for (int j = 0; j < outs; j++)                                              \
                    _mm_prefetch((const char *)w + j * a->stride + ahead, _MM_HINT_T1);            \
            UNROLL for (int r = 0; r < rows; r++) {                                                \
                const __m512i x = _mm512_loadu_si512(a->x[r] + 64 * (begin + b));                  \
                xe[r] = _mm512_castsi512_ps(_mm512_slli_epi32(x, 16));                             \
                xo[r] = _mm512_castsi512_ps(_mm512_and_si512(x, high));                            \
            }                                                                                      \
            UNROLL for (int j = 0; j < outs; j++) {                                                \
                const uint8_t *wj = w + j * a->stride;                                             \
                __m512 we, wo;                                                                     \
                EACH                                                                               \
                UNROLL for (int r = 0; r < rows; r++) {                                            \
                    f32x16 *to = &acc[r * outs + j];                                               \
                    *to = (f32x16)_mm512_fmadd_ps(xo[r], wo, (__m512)*to);                         \
                    *to = (f32x16)_mm512_fmadd_ps(xe[r], we, (__m512)*to);                         \
                }                                                                                  \
            }                                                                                      \
        }                                                                                          \
    }

FEW_TILE(few_codes, AVX512, {
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)wj));
    const __m512 values =
        format == INT4 ? _mm512_loadu_ps(scales->values[group][first + j])
                       : _mm512_castsi512_ps(_mm512_add_epi32(
                             table, _mm512_maskz_broadcastd_epi32(
                                        0xfefe, _mm_loadu_si32(&scales->add[first + j][b]))));
    we = _mm512_permutexvar_ps(codes, values);
    wo = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), values);
})

FEW_TILE(few_int8, BF16_512, {
    const __m512 by = _mm512_set1_ps(scales->by[first + j]);
    const __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)wj)));
    const __m512 up =
        _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(wj + 16))));
    const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(_mm512_mul_ps(up, by), _mm512_mul_ps(low, by));
    we = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    wo = _mm512_castsi512_ps(_mm512_and_si512(both, high));
})
#undef FEW_TILE

#ifdef HAS_BF16
#define BF16_VBMI __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vbmi,fma")))

/* The 16 values times each scale, as bf16, twice: five bits of a code choose, the fifth is another's. */
static uint16_t SCALED_VALUES[256][32] __attribute__((aligned(64)));

__attribute__((constructor)) static void few_values(void) {
    for (int scale = 0; scale < 256; scale++) {
        scaled_values((uint8_t)scale, SCALED_VALUES[scale]);
        memcpy(SCALED_VALUES[scale] + 16, SCALED_VALUES[scale], 32);
    }
}

BF16_VBMI INLINE int few_pairs_scales(const few_args *a, long begin, long blocks, int format,
                                  few_scales *to) {
    if (format == MXFP4) return 1;
    const long first = begin * 32 / a->shared, groups = (blocks * 32 + a->shared - 1) / a->shared;
    const uint32_t *scales = (const uint32_t *)a->scales + first;
    for (int o = 0; o < 16; o++, scales += a->k / a->shared)
        for (long g = 0; g < groups; g++) {
            const __m512i bits = _mm512_castps_si512(int4_values(_mm512_set1_epi32((int)scales[g])));
            const __m256i values = _mm512_cvtepi32_epi16(_mm512_srli_epi32(bits, 16));
            _mm512_store_si512(to->pairs[g][o], _mm512_broadcast_i64x4(values));
        }
    return 1;
}

/* As the tiles above. A block's 16 bytes lie in all four quarters of a vector, and each of its quads
 * takes four codes, of the first or of the last eight bytes: that is x's order but for the quads,
 * which x is brought into, and the sums out of. */
BF16_VBMI INLINE void few_pairs(const few_args *a, long begin, long blocks, const few_scales *scales,
                            int first, int rows, int outs, int format, f32x16 *acc) {
    const __m512i quads = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
    const __m512i places = _mm512_setr_epi64( /* of the bits that each byte takes */
        0x0c0c080804040000, 0x0c0c080804040000, 0x1c1c181814141010, 0x1c1c181814141010,
        0x2c2c282824242020, 0x2c2c282824242020, 0x3c3c383834343030, 0x3c3c383834343030);
    const long ahead = 16 * a->stride, all = a->k / 32, per = format == INT4 ? a->shared / 32 : 1;
    const uint8_t *w = a->w + first * a->stride + 16 * begin;
    const uint8_t *by = (const uint8_t *)a->scales + first * all + begin;
    for (long b = 0; b < blocks; b++, w += 16) {
        const long group = format == INT4 ? b / per : 0;
        __m512i x[FEW];
        if (b % 4 == 0)
            UNROLL for (int j = 0; j < outs; j++)
                _mm_prefetch((const char *)w + j * a->stride + ahead, _MM_HINT_T1);
        UNROLL for (int r = 0; r < rows; r++)
            x[r] = _mm512_permutexvar_epi64(quads, _mm512_loadu_si512(a->x[r] + 64 * (begin + b)));
        UNROLL for (int j = 0; j < outs; j++) {
            const __m128i bytes = _mm_loadu_si128((const __m128i *)(w + j * a->stride));
            const __m512i codes = _mm512_multishift_epi64_epi8(places, _mm512_broadcast_i32x4(bytes));
            const uint16_t *values = format == INT4 ? scales->pairs[group][first + j]
                                                    : SCALED_VALUES[by[j * all + b]];
            const __m512i pairs = _mm512_permutexvar_epi16(codes, _mm512_load_si512(values));
            UNROLL for (int r = 0; r < rows; r++)
                acc[r * outs + j] = (f32x16)_mm512_dpbf16_ps((__m512)acc[r * outs + j], (__m512bh)x[r],
                                                             (__m512bh)pairs);
        }
    }
}

/* Sums whose quads lie in that order. */
BF16_VBMI INLINE f32x16 few_in_order(f32x16 sums) {
    const __m512i quads = _mm512_setr_epi64(0, 2, 4, 6, 1, 3, 5, 7);
    return (f32x16)_mm512_permutexvar_pd(quads, (__m512d)sums);
}
#endif

/* What a tile needs of scales; 0: some do not add up. */
AVX512 INLINE int few_codes_scales(const few_args *a, long begin, long blocks, int format,
                                   few_scales *to) {
    if (format == MXFP4) return few_mxfp4(a, begin, blocks, to);
    few_int4(a, begin, blocks, to);
    return 1;
}

BF16_512 INLINE int few_int8_scales(const few_args *a, long begin, long blocks, int format,
                                    few_scales *to) {
    (void)begin, (void)blocks, (void)format;
    memcpy(to->by, a->scales, sizeof to->by);
    return 1;
}

INLINE f32x16 few_as_is(f32x16 sums) { return sums; }

/* 16 outs of up to `FEW` rows. */
#define FEW_OUTS(NAME, TARGET, OTHER, WHOLE_SPAN, IN_ORDER)                                        \
    TARGET INLINE int NAME##_of(const few_args *a, const char *bias, char *y, long n, int live,    \
                                int rows, int format) {                                            \
        const int outs = 16 / rows;                                                                \
        const long all = a->k / 32;                                                                \
        const long span = format == INT4 ? READY * (a->shared / 32) : WHOLE_SPAN; \
        f32x16 acc[FEW][16];                                                                       \
        few_scales scales;                                                                         \
        UNROLL for (int t = 0; t < rows; t++)                                                      \
            UNROLL for (int i = 0; i < 16; i++) acc[t][i] = (f32x16){0};                           \
        for (long b = 0; b < all; b += span) {                                                     \
            const long blocks = all - b < span ? all - b : span;                                   \
            if (!NAME##_scales(a, b, blocks, format, &scales)) return 0;                           \
            UNROLL for (int t = 0; t < rows; t++)                                                  \
                NAME(a, b, blocks, &scales, t * outs, rows, outs, format, acc[t]);                 \
        }                                                                                          \
        UNROLL for (int t = 0; t < rows; t++)                                                      \
            UNROLL for (int i = 0; i < 16; i++) acc[t][i] = IN_ORDER(acc[t][i]);                   \
        UNROLL for (int t = 0; t < rows; t++)                                                      \
            store_tile(acc[t], bias ? bias + t * outs * 2 : NULL, y + t * outs * 2, n, live, outs, \
                       rows, outs, BFLOAT16);                                                      \
        return 1;                                                                                  \
    }                                                                                              \
    FEW_ROWS(NAME, TARGET, 1, OTHER)                                                               \
    FEW_ROWS(NAME, TARGET, 2, OTHER)                                                               \
    FEW_ROWS(NAME, TARGET, 4, OTHER)                                                               \
    INLINE int NAME##_by(const few_args *a, const char *bias, char *y, long n, int live,           \
                         int format) {                                                             \
        return (live == 1 ? NAME##_1 : live == 2 ? NAME##_2 : NAME##_4)(a, bias, y, n, live, format); \
    }

/* Of each number of rows a function of its own, which has all registers. OTHER: the format that is
 * not int4. */
#define FEW_ROWS(NAME, TARGET, ROWS, OTHER)                                                        \
    TARGET static __attribute__((noinline)) int NAME##_##ROWS(                                     \
        const few_args *a, const char *bias, char *y, long n, int live, int format) {              \
        if (format == INT4) return NAME##_of(a, bias, y, n, live, ROWS, INT4);                     \
        return NAME##_of(a, bias, y, n, live, ROWS, OTHER);                                        \
    }

FEW_OUTS(few_codes, AVX512, MXFP4, SPAN, few_as_is)
FEW_OUTS(few_int8, BF16_512, INT8, all, few_as_is)
#ifdef HAS_BF16
FEW_OUTS(few_pairs, BF16_VBMI, MXFP4, all, few_in_order)
#endif
#undef FEW_OUTS
#undef FEW_ROWS

INLINE int few_of(const packed_args *a, long g, long o, long rows, int pairs) {
    (void)pairs;
    if (rows > MOST || a->k % 32) return 0;
    if (a->format == INT8 && !__builtin_cpu_supports("avx512bf16")) return 0;
    const long row = a->format == INT8 ? 4 : a->format == INT4 ? a->k / a->shared * 4 : a->k / 32;
    few_args of = {
        .k = a->k,
        .stride = a->format == INT8 ? a->k : a->k / 2,
        .shared = a->shared,
        .scales = (const char *)a->scales[g] + o * row,
    };
    of.w = (const uint8_t *)a->weights[g] + o * of.stride;
    const char *bias = a->biases ? (const char *)a->biases[g] + o * 2 : NULL;
    for (long r = 0; r < rows; r += FEW) {
        const long from = a->begins[g] + r;
        const int live = (int)(rows - r < FEW ? rows - r : FEW);
        char *y = a->y + (from * a->n + o) * 2;
        for (int i = 0; i < FEW; i++) of.x[i] = a->x + (from + (i < live ? i : live - 1)) * a->k * 2;
        if (a->format == INT8) few_int8_by(&of, bias, y, a->n, live, INT8);
#ifdef HAS_BF16
        else if (pairs && a->format == INT4) few_pairs_by(&of, bias, y, a->n, live, INT4);
        else if (pairs) few_pairs_by(&of, bias, y, a->n, live, MXFP4);
#endif
        else if (a->format == INT4) few_codes_by(&of, bias, y, a->n, live, INT4);
        else if (!few_codes_by(&of, bias, y, a->n, live, MXFP4)) return 0;
    }
    return 1;
}

static int few_avx512(const packed_args *a, long g, long o, long rows) { return few_of(a, g, o, rows, 0); }

/* On processors with products of bf16. */
static int few_avx512_bf16(const packed_args *a, long g, long o, long rows) {
    return few_of(a, g, o, rows, __builtin_cpu_supports("avx512vbmi"));
}
