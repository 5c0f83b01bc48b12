/* Grouped linear layers, RMS norm and paged attention for CPUs.
 *
 * One rule shapes every loop here: the bits of a result depend on its own operands only, never on
 * how many rows, sequences or experts share the call. Each dot product has its own 16 lanes of
 * float32, filled in the order of the inner dimension and folded by one fixed tree; tiles only
 * decide which dot products run side by side. Softmax walks the keys in tiles of 16 positions
 * aligned to position 0. So a key computed in a prefill and one computed token by token are equal,
 * and `--deterministic` needs no second implementation.
 *
 * Vectors are GCC/clang vector extensions of 16 floats; the compiler lowers them to whatever the
 * target has. The hot bodies are inlined into one copy per instruction set, chosen once per
 * process. Copies with fused multiply-add differ in the last bit from those without; and where
 * the CPU has tile registers (AMX), products of bf16 have a kernel of their own.
 *
 * bfloat16 is read in pairs: the low half of a 32-bit lane shifted up is the even element, the
 * high half masked is the odd one. Both operands are split the same way, so the order of the sum
 * is (odd, even) of each 32 elements and no shuffle is needed.
 */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "tables.h"

#define KEY_TILE 16 /* keys per softmax tile; part of the result's definition */
#define PANEL 32    /* query rows sharing one unpacked key tile */

typedef float f32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef uint64_t u64x8 __attribute__((vector_size(64), may_alias));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 16")

enum { FLOAT32 = 0, BFLOAT16 = 1 };

/* Of an instruction set: few vector registers, or 16 of 256 bits, or 32 of 512 bits, or those and products
 * of bf16. */
enum { SMALL = 0, HALVES = 1, BIG = 2, BIG_BF16 = 3 };

/* vdpbf16ps is two fused multiply-adds, the odd elements' and then the even ones' (subnormal numbers
 * are 0 to it); what has no such instruction does the same in two. */
#if defined(__x86_64__) && !defined(__clang__)
#define HAS_BF16 1
#endif

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (i32x16){__VA_ARGS__})
#endif

/* ---- scalars and vectors ------------------------------------------------------------------ */

INLINE f32x16 load_f32(const void *p) {
    f32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE u32x16 load_u32(const void *p) {
    u32x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE f32x16 even(u32x16 pairs) { return (f32x16)(pairs << 16); }
INLINE f32x16 odd(u32x16 pairs) { return (f32x16)(pairs & 0xffff0000u); }
INLINE f32x16 splat(float x) { return x - (f32x16){0}; }

INLINE float from_bf16(uint16_t x) {
    uint32_t u = (uint32_t)x << 16;
    float f;
    memcpy(&f, &u, 4);
    return f;
}

INLINE uint16_t to_bf16(float f) {
    uint32_t u;
    memcpy(&u, &f, 4);
    if ((u & 0x7fffffffu) > 0x7f800000u) return 0x7fc0;
    return (uint16_t)((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

INLINE u16x16 load_u16(const void *p) {
    u16x16 v;
    memcpy(&v, p, sizeof v);
    return v;
}

/* `to_bf16` of each. */
INLINE u16x16 round16(f32x16 f) {
    const u32x16 u = (u32x16)f;
    const u32x16 near = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
    const u32x16 nan = (u32x16)((i32x16)(0x7f800000u - (u & 0x7fffffffu)) >> 31); /* all bits, or none */
    return __builtin_convertvector((near & ~nan) | (0x7fc0u & nan), u16x16);
}

/* The larger; b where one is NaN. Comparisons elsewhere are avoided: gcc 12 takes most of them,
 * at 512 bits, apart into scalars. */
INLINE f32x16 fmax16(f32x16 a, f32x16 b) {
    i32x16 m = a > b;
    return (f32x16)(((i32x16)a & m) | ((i32x16)b & ~m));
}

#define FLIP8(v) SHUFFLE(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7)
#define FLIP4(v) SHUFFLE(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11)
#define FLIP2(v) SHUFFLE(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13)
#define FLIP1(v) SHUFFLE(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14)

/* The sum of all lanes, by the tree of `fold16`. */
INLINE float fold(f32x16 v) {
    v += FLIP8(v);
    v += FLIP4(v);
    v += FLIP2(v);
    v += FLIP1(v);
    return v[0];
}

INLINE float max_of(f32x16 v) {
    v = fmax16(v, FLIP8(v));
    v = fmax16(v, FLIP4(v));
    v = fmax16(v, FLIP2(v));
    v = fmax16(v, FLIP1(v));
    return v[0];
}

/* Two half vectors as one: what has 16 registers of 256 bits keeps sums in halves. */
INLINE f32x16 join(f32x8 low, f32x8 high) {
    f32x16 v;
    memcpy(&v, &low, sizeof low);
    memcpy((char *)&v + sizeof low, &high, sizeof high);
    return v;
}

INLINE f32x8 load_half(const void *p) {
    f32x8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE u32x8 load_pairs(const void *p) {
    u32x8 v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE f32x8 even8(u32x8 pairs) { return (f32x8)(pairs << 16); }
INLINE f32x8 odd8(u32x8 pairs) { return (f32x8)(pairs & 0xffff0000u); }

/* Lane i of the result is the sum of a[i]; halves, quarters, pairs, as in `fold`. */
INLINE f32x16 fold16(const f32x16 *a) {
    f32x16 h[8], q[4], p[2];
    UNROLL for (int i = 0; i < 8; i++)
        h[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               SHUFFLE(a[2 * i], a[2 * i + 1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 4; i++)
        q[i] = SHUFFLE(h[2 * i], h[2 * i + 1], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               SHUFFLE(h[2 * i], h[2 * i + 1], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    UNROLL for (int i = 0; i < 2; i++)
        p[i] = SHUFFLE(q[2 * i], q[2 * i + 1], 0, 1, 4, 5, 8, 9, 12, 13, 16, 17, 20, 21, 24, 25, 28, 29) +
               SHUFFLE(q[2 * i], q[2 * i + 1], 2, 3, 6, 7, 10, 11, 14, 15, 18, 19, 22, 23, 26, 27, 30, 31);
    return SHUFFLE(p[0], p[1], 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           SHUFFLE(p[0], p[1], 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
}

#if defined(__clang__)
#define SHUFFLE8(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE8(a, b, ...) __builtin_shuffle(a, b, (i32x8){__VA_ARGS__})
#endif

/* As `fold16`, of the first `live` of 8 vectors whose halves are added up already; the others count as 0. */
INLINE f32x8 fold8(const f32x8 *a, int live) {
    f32x8 h[8], q[4], p[2];
    UNROLL for (int i = 0; i < 8; i++) h[i] = i < live ? a[i] : (f32x8){0};
    UNROLL for (int i = 0; i < 4; i++)
        q[i] = SHUFFLE8(h[i], h[i + 4], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE8(h[i], h[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    UNROLL for (int i = 0; i < 2; i++)
        p[i] = SHUFFLE8(q[2 * i], q[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE8(q[2 * i], q[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE8(p[0], p[1], 0, 2, 8, 10, 4, 6, 12, 14) + SHUFFLE8(p[0], p[1], 1, 3, 9, 11, 5, 7, 13, 15);
}

/* e^x for x <= 0, within 2 ulp; about 1e-38 below -87. */
INLINE f32x16 exp16(f32x16 x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: adding it rounds to an integer */
    x = fmax16(splat(-87.0f), x);
    f32x16 shifted = x * 1.44269504088896341f + magic;
    f32x16 n = shifted - magic;
    f32x16 r = x - n * 0.693359375f;
    r = r + n * 2.12194440e-4f;
    f32x16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    i32x16 exponent = ((i32x16)shifted - 0x4b400000 + 127) << 23;
    return y * (f32x16)exponent;
}

INLINE float exp1(float x) {
    f32x16 v = exp16(splat(x));
    return v[0];
}

/* ---- grouped linear ----------------------------------------------------------------------- */

/* Memory that is needed later, a line of each of some rows; as far as two caches. */
INLINE void fetch_ahead(const char *ahead, long stride, int lines) {
    UNROLL for (int j = 0; j < lines; j++) __builtin_prefetch(ahead + j * stride, 0, 2);
}

#ifdef HAS_BF16
/* As `dot_tile`, of weights of a mapped file, which begin anywhere: a load across two cache lines takes
 * two, so whole lines are loaded, and what a product takes of two of them is put together. Returns
 * how many elements are done: all but the last 32, behind which nothing may be read; 0: not needed. */
INLINE long dot_across_lines(const char **x, const char **w, long k, int rows, int outs,
                             const char *ahead, int lines, f32x16 *acc) {
    const uintptr_t off = (uintptr_t)w[0] % 64;
    if (!off || off % 8 || k % 32) return 0;
    const u64x8 taken = (u64x8){0, 1, 2, 3, 4, 5, 6, 7} + off / 8;
    u64x8 low[4];
    UNROLL for (int o = 0; o < outs; o++) low[o] = *(const u64x8 *)(w[o] - off);
    long i = 0;
    for (; i < k - 32; i += 32) {
        u64x8 wp[4];
        fetch_ahead(ahead + i * 2, k * 2, lines);
        UNROLL for (int o = 0; o < outs; o++) {
            const u64x8 high = *(const u64x8 *)(w[o] - off + i * 2 + 64);
            wp[o] = __builtin_shuffle(low[o], high, taken);
            low[o] = high;
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const u32x16 xp = load_u32(x[r] + i * 2);
            UNROLL for (int o = 0; o < outs; o++)
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc[r * outs + o]) : "v"(xp), "v"(wp[o]));
        }
    }
    return i;
}
#endif

#if defined(__x86_64__)
/* Half of the 16 sums of each of 2 x 6 dot products, over so many bytes of each row, in the 16 registers that there
 * are: what a compiler makes of it keeps one sum in memory, and takes twice the time. So would sums of an array, which
 * large functions keep there. x, w: the first of two rows and of six, `row` bytes apart. */
INLINE void dot_2_by_6(const char *x, const char *w, long row, long bytes, int dtype, const char *ahead, int lines,
                       f32x8 *sum) {
    const u32x8 high = (u32x8){0} + 0xffff0000u;
    f32x8 a = sum[0], b = sum[1], c = sum[2], d = sum[3], e = sum[4], f = sum[5];
    f32x8 g = sum[6], h = sum[7], i = sum[8], j = sum[9], k = sum[10], l = sum[11];
#define ODD(FROM, INTO) "vpand " FROM ", %[high], " INTO "\n\t"
#define EVEN(FROM, INTO) "vmovdqu " FROM ", " INTO "\n\tvpslld $16, " INTO ", " INTO "\n\t"
#define WHOLE_F32(FROM, INTO) "vmovups " FROM ", " INTO "\n\t"
#define BOTH(A, B) "vfmadd231ps %%ymm13, %%ymm15, %[" A "]\n\tvfmadd231ps %%ymm14, %%ymm15, %[" B "]\n\t"
#define TAKE(PART)                                                                                 \
    PART("(%[x])", "%%ymm13") PART("(%[x],%[row])", "%%ymm14")                                     \
    PART("(%[w])", "%%ymm15") BOTH("a", "g")                                                       \
    PART("(%[w],%[row])", "%%ymm15") BOTH("b", "h")                                                \
    PART("(%[w],%[row],2)", "%%ymm15") BOTH("c", "i")                                              \
    PART("(%[w3])", "%%ymm15") BOTH("d", "j")                                                      \
    PART("(%[w3],%[row])", "%%ymm15") BOTH("e", "k")                                               \
    PART("(%[w3],%[row],2)", "%%ymm15") BOTH("f", "l")
#define SUMS                                                                                       \
    [a] "+x"(a), [b] "+x"(b), [c] "+x"(c), [d] "+x"(d), [e] "+x"(e), [f] "+x"(f), [g] "+x"(g),     \
        [h] "+x"(h), [i] "+x"(i), [j] "+x"(j), [k] "+x"(k), [l] "+x"(l)
#define PLACES [high] "x"(high), [x] "r"(x), [w] "r"(w), [w3] "r"(w3), [row] "r"(row)
    const char *w3 = w + 3 * row;
    for (const char *end = x + bytes; x < end; x += 64, w += 64, w3 += 64, ahead += 64) {
        fetch_ahead(ahead, row, lines);
        if (dtype == BFLOAT16) __asm__(TAKE(ODD) TAKE(EVEN) : SUMS : PLACES : "memory", "xmm13", "xmm14", "xmm15");
        else __asm__(TAKE(WHOLE_F32) : SUMS : PLACES : "memory", "xmm13", "xmm14", "xmm15");
    }
    sum[0] = a, sum[1] = b, sum[2] = c, sum[3] = d, sum[4] = e, sum[5] = f;
    sum[6] = g, sum[7] = h, sum[8] = i, sum[9] = j, sum[10] = k, sum[11] = l;
#undef PLACES
#undef SUMS
#undef TAKE
#undef BOTH
#undef WHOLE_F32
#undef EVEN
#undef ODD
}
#endif

/* Dot products of `rows` x rows with `outs` weight rows, rows * outs <= 16, both compile-time.
 * acc[r * outs + o] = x[r] . w[o] over `k` elements, 16 partial sums; acc starts at 0. Meanwhile as much
 * of `lines` weight rows that come later is fetched from `ahead` on: what is computed hides what is
 * read. */
INLINE void dot_tile(const char **x, const char **w, long k, int rows, int outs, int dtype,
                     int level, const char *ahead, int lines, f32x16 *acc) {
    const long step = dtype == BFLOAT16 ? 32 : 16;
    const long width = dtype == BFLOAT16 ? 2 : 4;
    long whole = k / step * step;
    if (level == SMALL) {
        f32x8 sum[4][2];
        UNROLL for (int t = 0; t < rows * outs; t++) sum[t][0] = sum[t][1] = (f32x8){0};
        for (long i = 0; i < whole * width; i += 64) {
            UNROLL for (int h = 0; h < 2; h++) {
                UNROLL for (int r = 0; r < rows; r++) {
                    UNROLL for (int o = 0; o < outs; o++) {
                        const char *xi = x[r] + i + 32 * h, *wi = w[o] + i + 32 * h;
                        f32x8 *into = &sum[r * outs + o][h];
                        if (dtype == BFLOAT16) {
                            *into += odd8(load_pairs(xi)) * odd8(load_pairs(wi));
                            *into += even8(load_pairs(xi)) * even8(load_pairs(wi));
                        } else {
                            *into += load_half(xi) * load_half(wi);
                        }
                    }
                }
            }
        }
        UNROLL for (int t = 0; t < rows * outs; t++) acc[t] = join(sum[t][0], sum[t][1]);
    }
#ifdef HAS_BF16
    long begin = 0; /* up to where the sums go already */
    if (level == BIG_BF16 && dtype == BFLOAT16 && rows == 4)
        begin = dot_across_lines(x, w, k, rows, outs, ahead, lines, acc);
    for (long i = begin; level == BIG_BF16 && dtype == BFLOAT16 && i < whole; i += step) {
        u32x16 wp[16];
        fetch_ahead(ahead + i * 2, k * 2, lines);
        UNROLL for (int o = 0; o < outs; o++) {
            wp[o] = load_u32(w[o] + i * 2);
            if (rows > 1) __asm__("" : "+v"(wp[o])); /* it would be loaded again for each row */
        }
        UNROLL for (int r = 0; r < rows; r++) {
            const u32x16 xp = load_u32(x[r] + i * 2);
            UNROLL for (int o = 0; o < outs; o++)
                __asm__("vdpbf16ps %2, %1, %0" : "+v"(acc[r * outs + o]) : "v"(xp), "v"(wp[o]));
        }
    }
    const int shifts = level == BIG || (level == BIG_BF16 && dtype != BFLOAT16);
#else
    const int shifts = level >= BIG;
#endif
    for (long i = 0; shifts && i < whole; i += step) {
        fetch_ahead(ahead + i * width, k * width, lines);
        if (dtype == BFLOAT16) {
            u32x16 wp[16];
            UNROLL for (int o = 0; o < outs; o++) wp[o] = load_u32(w[o] + i * 2);
            UNROLL for (int r = 0; r < rows; r++) {
                u32x16 xp = load_u32(x[r] + i * 2);
                f32x16 xe = even(xp), xo = odd(xp);
                UNROLL for (int o = 0; o < outs; o++) {
                    acc[r * outs + o] += xo * odd(wp[o]);
                    acc[r * outs + o] += xe * even(wp[o]);
                }
            }
        } else {
            f32x16 wv[16];
            UNROLL for (int o = 0; o < outs; o++) wv[o] = load_f32(w[o] + i * 4);
            UNROLL for (int r = 0; r < rows; r++) {
                f32x16 xv = load_f32(x[r] + i * 4);
                UNROLL for (int o = 0; o < outs; o++) acc[r * outs + o] += xv * wv[o];
            }
        }
    }
    if (whole == k) return;
    char xt[4][64], wt[16][64]; /* the rest, padded with zeros */
    long bytes = (k - whole) * width;
    for (int r = 0; r < rows; r++) {
        memset(xt[r], 0, 64);
        memcpy(xt[r], x[r] + whole * width, bytes);
    }
    for (int o = 0; o < outs; o++) {
        memset(wt[o], 0, 64);
        memcpy(wt[o], w[o] + whole * width, bytes);
    }
    UNROLL for (int r = 0; r < rows; r++) {
        UNROLL for (int o = 0; o < outs; o++) {
            if (dtype == BFLOAT16) {
                u32x16 xp = load_u32(xt[r]), wp = load_u32(wt[o]);
                acc[r * outs + o] += odd(xp) * odd(wp);
                acc[r * outs + o] += even(xp) * even(wp);
            } else {
                acc[r * outs + o] += load_f32(xt[r]) * load_f32(wt[o]);
            }
        }
    }
}

/* The sums of a tile, with the bias: the first `live_rows` and `live_outs` of it. */
INLINE void store_tile(const f32x16 *acc, const char *bias, char *y, long n, int live_rows,
                       int live_outs, int rows, int outs, int dtype) {
    float sums[16] = {0};
    if (rows * outs >= 8) { /* what there is not of 16 is 0 */
        f32x16 s = fold16(acc);
        if (dtype == BFLOAT16 && live_outs == outs) {
            uint16_t add[16] = {0};
            UNROLL for (int r = 0; r < rows; r++)
                if (bias) memcpy(add + r * outs, bias, outs * 2);
            if (bias) s += (f32x16)(__builtin_convertvector(load_u16(add), u32x16) << 16);
            const u16x16 rounded = round16(s);
            UNROLL for (int r = 0; r < rows; r++)
                if (r < live_rows) memcpy(y + r * n * 2, (const char *)&rounded + r * outs * 2, outs * 2);
            return;
        }
        memcpy(sums, &s, sizeof s);
    } else {
        UNROLL for (int i = 0; i < rows * outs; i++) sums[i] = fold(acc[i]);
    }
    for (int r = 0; r < live_rows; r++) {
        for (int o = 0; o < live_outs; o++) {
            float v = sums[r * outs + o];
            if (dtype == BFLOAT16) {
                if (bias) v += from_bf16(((const uint16_t *)bias)[o]);
                ((uint16_t *)y)[r * n + o] = to_bf16(v);
            } else {
                if (bias) v += ((const float *)bias)[o];
                ((float *)y)[r * n + o] = v;
            }
        }
    }
}

/* One tile of y = x w^T + b: writes the first `live_rows`, known at compile time, and `live_outs` of it. */
INLINE void linear_tile(const char *x, const char *w, const char *bias, char *y, long k, long n,
                        int live_rows, int live_outs, int rows, int outs, int dtype, int level,
                        const char *ahead, int lines) {
    const long width = dtype == BFLOAT16 ? 2 : 4;
    const char *xp[4], *wp[16];
    f32x16 acc[16];
    UNROLL for (int r = 0; r < rows; r++) xp[r] = x + (r < live_rows ? r : live_rows - 1) * k * width;
    UNROLL for (int o = 0; o < outs; o++) wp[o] = w + (o < live_outs ? o : live_outs - 1) * k * width;
    UNROLL for (int i = 0; i < 16; i++) acc[i] = (f32x16){0};
    dot_tile(xp, wp, k, rows, outs, dtype, level, ahead, lines, acc);
    store_tile(acc, bias, y, n, live_rows, live_outs, rows, outs, dtype);
}

enum { COPIED = 32 << 10 }; /* bytes of weights that are copied to where they lie as vectors do */

/* How many weight rows of so many bytes stay in the nearest cache, beside a few rows of x. */
INLINE int resident_rows(long bytes) { return bytes <= 1024 ? 16 : bytes <= 4096 ? 8 : 4; }

/* So many bytes, a multiple of 64, to where they lie as vectors do. Inline: what the library has for
 * some KiB is slow from places that are no multiples of 64. */
INLINE void copy_lines(char *to, const char *from, long bytes) {
    for (long i = 0; i < bytes; i += 64) {
        const u32x16 line = load_u32(from + i);
        *(volatile u32x16 *)(to + i) = line;
    }
}

/* 4, 8 or 16 outs and 4 rows or more, by tiles of 4 x 4. Meanwhile as many weight rows are fetched from
 * `ahead` on (NULL: none), evenly, but not while rows of x come from the second cache, as they do at
 * the first of the tiles that share them: a processor waits for so many lines at a time and no more. */
INLINE void linear_panel(const char *x, const char *w, const char *bias, char *y, long rows, long outs, long k,
                         long stride, int dtype, int level, const char *ahead) {
    const long width = dtype == BFLOAT16 ? 2 : 4, row = k * width, every = rows < 16 ? 1 : rows < 32 ? 2 : rows / 16;
    long left = ahead ? outs : 0, tile = 0, r = 0;
#define TILE(R, O, LIVE, LINES)                                                                    \
    linear_tile(x + r * row, w + o * row, bias ? bias + o * width : NULL, y + (r * stride + o) * width, k,      \
                stride, LIVE, O, R, O, dtype, level, ahead, LINES)
#define FETCHING(LINES) (TILE(4, 4, 4, LINES), ahead += (LINES) * row, left -= LINES)
    for (; r + 4 <= rows; r += 4)
        for (long o = 0; o < outs; o += 4, tile++) {
            if (left == 0 || tile % every != every - 1) TILE(4, 4, 4, 0);
            else if (rows < 8) FETCHING(4);
            else if (rows < 32) FETCHING(2);
            else FETCHING(1);
        }
    if (rows - r == 3) {
        for (long o = 0; o < outs; o += 4) TILE(4, 4, 3, 0);
    } else if (rows - r == 2 && outs > 4) {
        for (long o = 0; o < outs; o += 8) TILE(2, 8, 2, 0);
    } else {
        for (; r < rows; r++) {
            const long o = 0;
            if (outs == 16) TILE(1, 16, 1, 0);
            else if (outs == 8) TILE(1, 8, 1, 0);
            else TILE(1, 4, 1, 0);
        }
    }
#undef FETCHING
#undef TILE
}

/* As `dot_2_by_6`, of few bytes or another number of rows. */
INLINE void dot_half(const char *x, const char *w, long row, int rows, int outs, int dtype, f32x8 *sum) {
#define TAKE(PART)                                                                                 \
    {                                                                                              \
        f32x8 xs[2];                                                                               \
        UNROLL for (int r = 0; r < rows; r++) xs[r] = PART(x + r * row);                           \
        UNROLL for (int o = 0; o < outs; o++) {                                                    \
            const f32x8 wo = PART(w + o * row);                                                    \
            UNROLL for (int r = 0; r < rows; r++) sum[r * outs + o] += xs[r] * wo;                 \
        }                                                                                          \
    }
#define ODD(P) odd8(load_pairs(P))
#define EVEN(P) even8(load_pairs(P))
    if (dtype == BFLOAT16) {
        TAKE(ODD)
        TAKE(EVEN)
    } else {
        TAKE(load_half)
    }
#undef EVEN
#undef ODD
#undef TAKE
}

/* A tile of y = x w^T + b with 16 registers of 256 bits: the lower lanes of all sums, then the upper ones; or, of one
 * row, both at once, so that a line of weights is read once. rows: 1 or 2; outs: up to 6; ahead: as in `dot_tile`. */
INLINE void tile_halves(const char *x, const char *w, const char *bias, char *y, long k, long stride, int rows,
                        int outs, int dtype, const char *ahead, int lines) {
    const long width = dtype == BFLOAT16 ? 2 : 4, row = k * width, whole = row / 64 * 64;
    const int count = rows * outs, at_once = rows == 1 ? 2 : 1;
    f32x8 sum[2][12];
    char rest[8][64]; /* of x and of w what is no whole line, padded with zeros */
    if (whole < row)
        UNROLL for (int i = 0; i < rows + outs; i++) {
            memset(rest[i], 0, 64);
            memcpy(rest[i], (i < rows ? x + i * row : w + (i - rows) * row) + whole, row - whole);
        }
    for (int half = 0; half < 2; half += at_once) {
        f32x8 now[2][12];
        UNROLL for (int h = 0; h < at_once; h++)
            UNROLL for (int t = 0; t < count; t++) now[h][t] = (f32x8){0};
        /* of the lines that are wanted later one half now, the other in the second turn */
        const char *later = ahead + half * lines / 2 * row;
        const int some = rows == 1 ? lines : lines / 2;
        long i = 0;
#if defined(__x86_64__)
        if (rows == 2 && outs == 6) {
            dot_2_by_6(x + 32 * half, w + 32 * half, row, whole, dtype, later, some, now[0]);
            i = whole;
        }
#endif
        for (; i < whole; i += 64) {
            fetch_ahead(later + i, row, some);
            UNROLL for (int h = 0; h < at_once; h++)
                dot_half(x + i + 32 * (half + h), w + i + 32 * (half + h), row, rows, outs, dtype, now[h]);
        }
        if (whole < row)
            UNROLL for (int h = 0; h < at_once; h++)
                dot_half(rest[0] + 32 * (half + h), rest[rows] + 32 * (half + h), 64, rows, outs, dtype, now[h]);
        UNROLL for (int t = 0; t < count; t++) {
            if (at_once == 2) sum[0][t] = now[0][t] + now[1][t];
            else if (half == 0) sum[0][t] = now[0][t];
            else sum[0][t] += now[0][t];
        }
    }
    f32x16 s = join(fold8(sum[0], count), count > 8 ? fold8(sum[0] + 8, count - 8) : (f32x8){0});
    if (dtype == BFLOAT16) {
        if (bias) {
            uint16_t add[16] = {0};
            UNROLL for (int r = 0; r < rows; r++) memcpy(add + r * outs, bias, outs * 2);
            s += (f32x16)(__builtin_convertvector(load_u16(add), u32x16) << 16);
        }
        const u16x16 rounded = round16(s);
        UNROLL for (int r = 0; r < rows; r++) memcpy(y + r * stride * 2, (const char *)&rounded + r * outs * 2, outs * 2);
    } else {
        if (bias) {
            float add[16] = {0};
            UNROLL for (int r = 0; r < rows; r++) memcpy(add + r * outs, bias, outs * 4);
            s += load_f32(add);
        }
        UNROLL for (int r = 0; r < rows; r++) memcpy(y + r * stride * 4, (const char *)&s + r * outs * 4, outs * 4);
    }
}

/* As `linear_group`, with 16 registers of 256 bits: tiles of 2 x 6, whose six weight rows stay in the nearest
 * cache for all rows of x, and meanwhile the next six are fetched. */
INLINE void linear_halves(const char *x, const char *w, const char *bias, char *y, long rows, long k,
                          long n, long stride, int dtype) {
    const long width = dtype == BFLOAT16 ? 2 : 4, row = k * width, every = rows < 12 ? 1 : rows / 6;
    long o = 0;
#define TILE(R, O, LINES)                                                                          \
    tile_halves(x + r * row, w + o * row, bias ? bias + o * width : NULL, y + (r * stride + o) * width, k,      \
                stride, R, O, dtype, ahead, LINES)
#define FETCHING(ROWS, LINES) (TILE(ROWS, 6, LINES), ahead += (LINES) * row, left -= LINES)
    for (; o + 6 <= n; o += 6) {
        const char *ahead = w + (o + 6) * row;
        long r = 0, left = o + 12 <= n ? 6 : 0;
        for (; r + 2 <= rows; r += 2) {
            if (left == 0 || r / 2 % every != every - 1) TILE(2, 6, 0);
            else if (rows < 4) FETCHING(2, 6);
            else if (rows < 6 && left == 6) FETCHING(2, 4);
            else FETCHING(2, 2);
        }
        if (r < rows && left == 6) TILE(1, 6, 6);
        else if (r < rows) TILE(1, 6, 0);
    }
#undef FETCHING
#define REST(O)                                                                                    \
    for (; o + O <= n; o += O) {                                                                   \
        long r = 0;                                                                                \
        for (; r + 2 <= rows; r += 2) TILE(2, O, 0);                                               \
        if (r < rows) TILE(1, O, 0);                                                               \
    }
    const char *ahead = w;
    REST(4)
    REST(1)
#undef REST
#undef TILE
}

/* y = x w^T + b of one group; rows of y lie `stride` apart. Tiles have 16 accumulators where there are 32 vector registers,
 * 12 with 16 of 256 bits, else 4. */
INLINE void linear_group(const char *x, const char *w, const char *bias, char *y, long rows, long k,
                         long n, long stride, int dtype, int level) {
    const long width = dtype == BFLOAT16 ? 2 : 4, row = k * width;
    const int tall = level >= BIG ? 4 : 2, block = 16;
    if (level == HALVES) {
        linear_halves(x, w, bias, y, rows, k, n, stride, dtype);
        return;
    }
    char copied[COPIED] __attribute__((aligned(64)));
    for (long o0 = 0; o0 < n; o0 += block) { /* 16 weight rows stay in the second cache for all x rows */
        const long outs = n - o0 < block ? n - o0 : block;
        const char *wb = w + o0 * row, *bb = bias ? bias + o0 * width : NULL;
        if (level >= BIG && outs == block && rows >= 4) {
            const long some = resident_rows(row);
            const int copies = rows >= 16 && (uintptr_t)w % 64 && row % 64 == 0 && some * row <= COPIED;
            for (long o = 0; o < block; o += some) {
                const char *from = wb + o * row;
                const char *ahead = o0 + o + 2 * some <= n ? from + some * row : NULL;
                if (copies) copy_lines(copied, from, some * row), from = copied;
                linear_panel(x, from, bb ? bb + o * width : NULL, y + (o0 + o) * width, rows, some, k, stride,
                             dtype, level, ahead);
            }
            continue;
        }
        for (long r0 = 0; r0 < rows; r0 += tall) {
            const int live = (int)(rows - r0 < tall ? rows - r0 : tall);
            const char *xr = x + r0 * row;
            char *yr = y + (r0 * stride + o0) * width;
#define TILE(R, O, LIVE, LINES)                                                                    \
    for (long o = 0; o < outs; o += O)                                                             \
    linear_tile(xr, wb + o * row, bb ? bb + o * width : NULL, yr + o * width, k, stride, LIVE,     \
                (int)(outs - o < O ? outs - o : O), R, O, dtype, level, wb + (block + o) * row, LINES)
            if (level >= BIG) {
                if (live == 1) TILE(1, 16, 1, 0); /* one or two rows leave no time to fetch anything */
                else if (live == 2) TILE(2, 8, 2, 0);
                else if (live == 4) TILE(4, 4, 4, 0);
                else if (rows == 3 && o0 + 2 * block <= n) TILE(4, 4, 3, 4);
                else TILE(4, 4, 3, 0);
            } else {
                if (live == 1) TILE(1, 4, 1, 0);
                else TILE(2, 2, 2, 0);
            }
#undef TILE
        }
    }
}

/* Rows begins[g] … ends[g] - 1 of x times weight g, of which the rows from `first` to before `last`. */
typedef struct {
    const char *x;
    const intptr_t *weights, *biases;
    const int32_t *begins, *ends;
    char *y;
    long groups, k, n, first, last;
    int dtype;
} grouped_args;

INLINE void grouped_body(const grouped_args *a, int dtype, int level) {
    const long width = dtype == BFLOAT16 ? 2 : 4, k = a->k;
    for (long g = 0; g < a->groups; g++) {
        const long begin = a->begins[g], rows = a->ends[g] - begin;
        if (rows <= 0) continue;
        linear_group(a->x + begin * k * width, (const char *)a->weights[g] + a->first * k * width,
                     a->biases ? (const char *)a->biases[g] + a->first * width : NULL,
                     a->y + (begin * a->n + a->first) * width, rows, k, a->last - a->first, a->n,
                     dtype, level);
    }
}

/* ---- grouped linear in bf16 by AMX -------------------------------------------------------- */

#if defined(__x86_64__) && defined(__linux__)
#define HAS_AMX 1
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#define AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma")))

/* A tile product is C[16 outs][16 rows] += W[16 outs][32] · X[32][16 rows]. So the weight is the
 * left operand and is read where it lies; only x, the smaller, is brought into the order of the
 * right one: for each 16 rows and 32 elements a block of 16 pairs x 16 rows. Rows that are not
 * there are zeros. Hardware adds up the 32 elements in an order of its own, the same for each
 * element of C: a row's bits are its own here too. */

typedef struct {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} tile_config;

static const tile_config TILES = {
    .palette = 1,
    .row_bytes = {64, 64, 64, 64, 64, 64, 64, 64},
    .rows = {16, 16, 16, 16, 16, 16, 16, 16},
};

enum { BLOCK = 1024 }; /* bytes of a tile */

/* a[i] lane j <-> a[j] lane i */
INLINE void transpose16(u32x16 *a) {
#define SWAP(D, LOW, HIGH)                                                                         \
    UNROLL for (int i = 0; i < 16; i++) if (!(i & D)) {                                            \
        u32x16 low = SHUFFLE(a[i], a[i + D], LOW), high = SHUFFLE(a[i], a[i + D], HIGH);           \
        a[i] = low;                                                                                \
        a[i + D] = high;                                                                           \
    }
#define ARGS(...) __VA_ARGS__
    SWAP(8, ARGS(0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
         ARGS(8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31))
    SWAP(4, ARGS(0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
         ARGS(4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31))
    SWAP(2, ARGS(0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
         ARGS(2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31))
    SWAP(1, ARGS(0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
         ARGS(1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31))
#undef SWAP
#undef ARGS
}

/* Up to 16 rows of x into blocks, one for each 32 elements, which are in the order of x where
 * `order` is NULL; else k is a multiple of 32. */
AMX static void amx_pack(const char *x, long rows, long k, const uint16_t *order, char *blocks) {
    for (long i = 0; i < k; i += 32, blocks += BLOCK) {
        u32x16 a[16];
        const uint32_t mask = k - i < 32 ? (1u << (k - i)) - 1 : ~0u;
        for (int r = 0; r < 16; r++)
            a[r] = r < rows ? (u32x16)_mm512_maskz_loadu_epi16(mask, x + (r * k + i) * 2) : (u32x16){0};
        for (int r = 0; order && r < rows; r++)
            a[r] = (u32x16)_mm512_permutexvar_epi16(_mm512_loadu_si512(order), (__m512i)a[r]);
        transpose16(a);
        memcpy(blocks, a, BLOCK);
    }
}

/* y[row][0 … outs-1] of a tile C[16 outs][16 rows]. */
AMX static void amx_store(const char *tile, const char *bias, char *y, long rows, long outs, long n) {
    u32x16 a[16];
    const __mmask16 live = (__mmask16)((1u << outs) - 1);
    const __m512 add = bias ? _mm512_castsi512_ps(_mm512_slli_epi32(
                                  _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(live, bias)), 16))
                            : _mm512_setzero_ps();
    memcpy(a, tile, BLOCK);
    transpose16(a);
    for (int r = 0; r < rows; r++)
        _mm256_mask_storeu_epi16(y + r * n * 2, live,
                                 (__m256i)_mm512_cvtneps_pbh(_mm512_add_ps((__m512)a[r], add)));
}

/* Where the weight rows of one step of 32 elements are: in place, or copied and padded. */
INLINE const char *amx_weight(const char *w, long i, long k, long outs, char *edge, long *stride) {
    if (k - i >= 32 && outs % 16 == 0) {
        *stride = k * 2;
        return w + i * 2;
    }
    *stride = 64;
    const long bytes = (k - i < 32 ? k - i : 32) * 2;
    memset(edge, 0, (outs + 15) / 16 * BLOCK);
    for (long o = 0; o < outs; o++) memcpy(edge + o * 64, w + (o * k + i) * 2, bytes);
    return edge;
}

#define LOAD_W(TILE, O) _tile_loadd(TILE, from + (O) * 16 * stride, stride)

/* 4 x 16 outs and up to 16 rows; c: four tiles. */
AMX static void amx_4_by_1(const char *w, const char *x, long k, char *c) {
    char edge[4 * BLOCK];
    long stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < k; i += 32, x += BLOCK) {
        const char *from = amx_weight(w, i, k, 64, edge, &stride);
        _tile_loadd(7, x, 64);
        LOAD_W(4, 0);
        _tile_dpbf16ps(0, 4, 7);
        LOAD_W(5, 1);
        _tile_dpbf16ps(1, 5, 7);
        LOAD_W(6, 2);
        _tile_dpbf16ps(2, 6, 7);
        LOAD_W(4, 3);
        _tile_dpbf16ps(3, 4, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + BLOCK, 64);
    _tile_stored(2, c + 2 * BLOCK, 64);
    _tile_stored(3, c + 3 * BLOCK, 64);
}

/* 2 x 16 outs and 2 x 16 rows; c: [2 of rows][2 of outs] tiles. */
AMX static void amx_2_by_2(const char *w, const char *x, const char *x2, long k, char *c) {
    char edge[2 * BLOCK];
    long stride;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (long i = 0; i < k; i += 32, x += BLOCK, x2 += BLOCK) {
        const char *from = amx_weight(w, i, k, 32, edge, &stride);
        _tile_loadd(6, x, 64);
        LOAD_W(4, 0);
        _tile_dpbf16ps(0, 4, 6);
        LOAD_W(5, 1);
        _tile_dpbf16ps(1, 5, 6);
        _tile_loadd(7, x2, 64);
        _tile_dpbf16ps(2, 4, 7);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, 64);
    _tile_stored(1, c + BLOCK, 64);
    _tile_stored(2, c + 2 * BLOCK, 64);
    _tile_stored(3, c + 3 * BLOCK, 64);
}

/* Up to 16 outs and up to 16 rows. */
AMX static void amx_1_by_1(const char *w, const char *x, long k, long outs, char *c) {
    char edge[BLOCK];
    long stride;
    _tile_zero(0);
    for (long i = 0; i < k; i += 32, x += BLOCK) {
        const char *from = amx_weight(w, i, k, outs, edge, &stride);
        _tile_loadd(7, x, 64);
        LOAD_W(4, 0);
        _tile_dpbf16ps(0, 4, 7);
    }
    _tile_stored(0, c, 64);
}
#undef LOAD_W

/* 64 outs stay in the L2 cache for all packed rows; rows of y lie `stride` apart. */
AMX static void amx_panel(const char *packed, const char *w, const char *bias, char *y, long rows,
                          long k, long n, long stride) {
    const long strip = (k + 31) / 32 * BLOCK; /* bytes of 16 packed rows */
    char c[4 * BLOCK] __attribute__((aligned(64)));
    for (long o0 = 0; o0 < n; o0 += 64) {
        const long outs = n - o0 < 64 ? n - o0 : 64;
        for (long r = 0; r < rows; r += 32) {
            const long live = rows - r < 32 ? rows - r : 32;
            const char *x = packed + r / 16 * strip;
            for (long o = 0; o < outs;) {
                const char *wo = w + (o0 + o) * k * 2, *b = bias ? bias + (o0 + o) * 2 : NULL;
                char *yo = y + (r * stride + o0 + o) * 2;
                if (live > 16 && outs - o >= 32) {
                    amx_2_by_2(wo, x, x + strip, k, c);
                    for (int t = 0; t < 4; t++)
                        amx_store(c + t * BLOCK, b ? b + t % 2 * 32 : NULL,
                                  yo + t / 2 * 16 * stride * 2 + t % 2 * 32, t < 2 ? 16 : live - 16, 16,
                                  stride);
                    o += 32;
                } else if (live <= 16 && outs - o >= 64) {
                    amx_4_by_1(wo, x, k, c);
                    for (int t = 0; t < 4; t++)
                        amx_store(c + t * BLOCK, b ? b + t * 32 : NULL, yo + t * 32, live, 16, stride);
                    o += 64;
                } else {
                    const long few = outs - o < 16 ? outs - o : 16;
                    for (long h = 0; h < live; h += 16) {
                        amx_1_by_1(wo, x + h / 16 * strip, k, few, c);
                        amx_store(c, b, yo + h * stride * 2, live - h < 16 ? live - h : 16, few, stride);
                    }
                    o += 16;
                }
            }
        }
    }
}

/* As `grouped_body`; -1: no memory. */
AMX static int amx_grouped(const grouped_args *a) {
    const int32_t *begins = a->begins, *ends = a->ends;
    const long groups = a->groups, k = a->k, first = a->first;
    const long strip = (k + 31) / 32 * BLOCK;
    long most = 0, strips = (512L << 10) / (strip ? strip : 1) / 2 * 2;
    for (long g = 0; g < groups; g++)
        if (ends[g] - begins[g] > most) most = ends[g] - begins[g];
    if (most == 0) return 0;
    if (strips < 2) strips = 2;
    if (strips * 16 > most) strips = (most + 15) / 16;
    char small[32 << 10] __attribute__((aligned(64)));
    char *packed = strips * strip <= (long)sizeof small ? small : aligned_alloc(64, strips * strip);
    if (!packed) return -1;
    _tile_loadconfig(&TILES);
    for (long g = 0; g < groups; g++) {
        for (long r = begins[g]; r < ends[g]; r += strips * 16) {
            const long rows = ends[g] - r < strips * 16 ? ends[g] - r : strips * 16;
            for (long h = 0; h < rows; h += 16)
                amx_pack(a->x + (r + h) * k * 2, rows - h < 16 ? rows - h : 16, k, NULL,
                         packed + h / 16 * strip);
            amx_panel(packed, (const char *)a->weights[g] + first * k * 2,
                      a->biases ? (const char *)a->biases[g] + first * 2 : NULL,
                      a->y + (r * a->n + first) * 2, rows, k, a->last - first, a->n);
        }
    }
    _tile_release();
    if (packed != small) free(packed);
    return 0;
}

/* The kernel hands out tile registers on request, once per process. */
static int amx_granted(void) {
    const long request_permission = 0x1023, tile_data = 18;
    return !syscall(SYS_arch_prctl, request_permission, tile_data);
}
#endif

#include "packed.c"

/* ---- paged attention ---------------------------------------------------------------------- */

typedef struct {
    const char *query, *key, *value; /* of this step; strides below, in elements */
    char *key_cache, *value_cache;   /* [blocks, block_size, kv_heads, dim]; values may lie in keys */
    const int32_t *query_start, *context_len, *block_tables;
    const int64_t *slot_mapping;
    const char *sinks; /* [heads] or NULL */
    char *out;         /* [tokens, heads, value_dim] */
    long query_stride[2], key_stride[2], value_stride[2]; /* token, head */
    long sequences, max_blocks, block_size, heads, kv_heads, key_dim, value_dim, value_row, window;
    float scaling, softcap;
    int dtype;
} attention_args;

/* Unpack `n` elements to floats, padded with zeros to a whole vector; bf16 becomes, for each 32
 * elements, 16 even ones and then 16 odd ones (`pack` undoes it). Vectors of 16 lie `apart` floats apart. */
INLINE void unpack(const char *src, float *dst, long n, long apart, int dtype) {
    char rest[64] = {0};
    if (dtype == FLOAT32) {
        for (long i = 0; i < n; i += 16, dst += apart) {
            const char *from = src + i * 4;
            if (n - i < 16) from = memcpy(rest, from, (n - i) * 4);
            memcpy(dst, from, 64);
        }
        return;
    }
    for (long i = 0; i < n; i += 32, dst += 2 * apart) {
        const char *from = src + i * 2;
        if (n - i < 32) from = memcpy(rest, from, (n - i) * 2);
        UNROLL for (int h = 0; h < 2; h++) {
            u32x8 pairs = load_pairs(from + 32 * h);
            f32x8 e = even8(pairs), o = odd8(pairs);
            memcpy(dst + 8 * h, &e, sizeof e);
            memcpy(dst + apart + 8 * h, &o, sizeof o);
        }
    }
}

INLINE void pack(const float *src, float scale, char *dst, long n, int dtype) {
    if (dtype == FLOAT32) {
        for (long i = 0; i < n; i++) ((float *)dst)[i] = src[i] * scale;
        return;
    }
    for (long i = 0; i < n; i += 32) {
        const u32x16 e = __builtin_convertvector(round16(load_f32(src + i) * scale), u32x16);
        const u32x16 o = __builtin_convertvector(round16(load_f32(src + i + 16) * scale), u32x16);
        const u32x16 pairs = e | o << 16;
        memcpy(dst + i * 2, &pairs, n - i < 32 ? (n - i) * 2 : 64);
    }
}

INLINE void store_kv(const attention_args *a) {
    const long width = a->dtype == BFLOAT16 ? 2 : 4;
    long tokens = a->query_start[a->sequences];
    for (long t = 0; t < tokens; t++) {
        long slot = a->slot_mapping[t];
        if (slot < 0) continue;
        for (long h = 0; h < a->kv_heads; h++) {
            memcpy(a->key_cache + (slot * a->kv_heads + h) * a->key_dim * width,
                   a->key + (t * a->key_stride[0] + h * a->key_stride[1]) * width,
                   a->key_dim * width);
            memcpy(a->value_cache + (slot * a->kv_heads + h) * a->value_row * width,
                   a->value + (t * a->value_stride[0] + h * a->value_stride[1]) * width,
                   a->value_dim * width);
        }
    }
}

#define NOT 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0
#define ALL -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1
static const int32_t FROM[32] = {NOT, ALL}; /* 16 from FROM + 16 - i: set from lane i on */
static const int32_t TO[32] = {ALL, NOT};   /* 16 from TO + 15 - i: set up to lane i */

/* Scores of one or two rows of queries, `apart` floats apart, with a tile of keys, KEY_TILE apart; with 16 registers of
 * 256 bits, and the sums of level BIG. */
INLINE void score_halves(const float *query, long apart, const float *keys, long width, int rows, float *scores) {
    f32x8 part[2][16];
    for (int half = 0; half < 2; half++)
        for (int j0 = 0; j0 < 16; j0 += 4) {
            const float *q = query + 8 * half, *k = keys + j0 * 16 + 8 * half;
            f32x8 sum[2][4];
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int j = 0; j < 4; j++) sum[r][j] = (f32x8){0};
            for (long c = 0; c < width; c += 16) {
                f32x8 qs[2];
                UNROLL for (int r = 0; r < rows; r++) qs[r] = load_half(q + r * apart + c);
                UNROLL for (int j = 0; j < 4; j++) {
                    const f32x8 key = load_half(k + c * KEY_TILE + j * 16);
                    UNROLL for (int r = 0; r < rows; r++) sum[r][j] += qs[r] * key;
                }
            }
            UNROLL for (int r = 0; r < rows; r++)
                UNROLL for (int j = 0; j < 4; j++) part[r][j0 + j] = half ? part[r][j0 + j] + sum[r][j] : sum[r][j];
        }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int h = 0; h < 2; h++) {
            const f32x8 eight = fold8(part[r] + 8 * h, 8);
            memcpy(scores + r * KEY_TILE + 8 * h, &eight, 32);
        }
}

/* Adds weighted values of keys from … to of a tile to 8 * `parts` columns of one or two rows of sums, `apart` floats
 * apart. weights: KEY_TILE a row. */
INLINE void weigh_columns(const float *weights, const float *values, long apart, int from, int to, int rows, int parts,
                          float *total) {
    f32x8 sum[2][4];
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < parts; i++) sum[r][i] = load_half(total + r * apart + 8 * i);
    for (int j = from; j <= to; j++) {
        const float first = weights[j], second = weights[(rows - 1) * KEY_TILE + j];
        UNROLL for (int i = 0; i < parts; i++) {
            const f32x8 value = load_half(values + i / 2 * 16 * KEY_TILE + j * 16 + i % 2 * 8);
            sum[0][i] += first * value;
            if (rows == 2) sum[1][i] += second * value;
        }
    }
    UNROLL for (int r = 0; r < rows; r++)
        UNROLL for (int i = 0; i < parts; i++) memcpy(total + r * apart + 8 * i, &sum[r][i], 32);
}

/* As `weigh_columns`, of all columns, a multiple of 16. */
INLINE void weigh_halves(const float *weights, const float *values, long width, long apart, int from, int to, int rows,
                         float *total) {
    long c = 0;
    for (; c + 32 <= width; c += 32)
        weigh_columns(weights, values + c * KEY_TILE, apart, from, to, rows, 4, total + c);
    if (c < width) weigh_columns(weights, values + c * KEY_TILE, apart, from, to, rows, 2, total + c);
}

/* The first key that a row at `position` sees. window: keys, itself included; 0: all; negative: those of its own chunk,
 * which begins at a multiple of -window. */
INLINE long first_seen(long position, long window) {
    if (window < 0) return position - position % -window;
    return window > 0 && position >= window ? position - window + 1 : 0;
}

/* All query rows of one sequence and one key head; `scratch` holds the tile and the panel. */
INLINE void attend(const attention_args *a, long s, long kv_head, float *scratch, int dtype, int level) {
    const long width = dtype == BFLOAT16 ? 2 : 4;
    const long kd = (a->key_dim + 31) / 32 * 32, vd = (a->value_dim + 31) / 32 * 32;
    const long group = a->heads / a->kv_heads;
    const long begin = a->query_start[s], rows = a->query_start[s + 1] - begin;
    const long context = a->context_len[s], first = context - rows; /* position of the first row */
    const int32_t *table = a->block_tables + s * a->max_blocks;
    float *key_tile = scratch, *value_tile = key_tile + KEY_TILE * kd;
    float *query = value_tile + KEY_TILE * vd, *acc = query + PANEL * kd;
    float peak[PANEL], sum[PANEL], shrinks[PANEL];
    float weights[PANEL][KEY_TILE] __attribute__((aligned(64))); /* of a tile: scores, and what they come to */
    long low[PANEL], high[PANEL]; /* positions seen: low <= key <= high */

    for (long m0 = 0; m0 < rows * group; m0 += PANEL) {
        const long panel = rows * group - m0 < PANEL ? rows * group - m0 : PANEL;
        for (long m = 0; m < panel; m++) {
            const long row = (m0 + m) / group, head = kv_head * group + (m0 + m) % group;
            unpack(a->query + ((begin + row) * a->query_stride[0] + head * a->query_stride[1]) * width,
                   query + m * kd, a->key_dim, 16, dtype);
            memset(acc + m * vd, 0, vd * sizeof(float));
            high[m] = first + row;
            low[m] = first_seen(high[m], a->window);
            if (a->sinks) { /* a key of value zero, whose score is learned */
                peak[m] = dtype == BFLOAT16 ? from_bf16(((const uint16_t *)a->sinks)[head])
                                            : ((const float *)a->sinks)[head];
                sum[m] = 1.0f;
            } else {
                peak[m] = -__builtin_inff();
                sum[m] = 0.0f;
            }
        }
        for (long t = low[0] / KEY_TILE; t <= high[panel - 1] / KEY_TILE; t++) {
            const long base = t * KEY_TILE;
            long block = base / a->block_size, offset = base % a->block_size;
            for (long j = 0; j < KEY_TILE && base + j < context; j++) {
                const long slot = table[block] * a->block_size + offset, next = base + j + KEY_TILE;
                long ahead = -1;
                if (next < context) {
                    long block2 = block, offset2 = offset + KEY_TILE;
                    while (offset2 >= a->block_size) offset2 -= a->block_size, block2++;
                    ahead = table[block2] * a->block_size + offset2;
                }
                if (++offset == a->block_size) {
                    offset = 0;
                    block++;
                }
                const char *key = a->key_cache + (slot * a->kv_heads + kv_head) * a->key_dim * width;
                const char *value = a->value_cache + (slot * a->kv_heads + kv_head) * a->value_row * width;
                if (ahead >= 0) { /* of the next tile; rows lie too far apart for the hardware */
                    const long step = (ahead - slot) * a->kv_heads * width;
                    for (long i = 0; i < a->key_dim * width; i += 64) __builtin_prefetch(key + step * a->key_dim + i);
                    for (long i = 0; i < a->value_dim * width; i += 64) __builtin_prefetch(value + step * a->value_row + i);
                }
                unpack(key, key_tile + j * 16, a->key_dim, 16 * KEY_TILE, dtype);
                unpack(value, value_tile + j * 16, a->value_dim, 16 * KEY_TILE, dtype);
            }
            const long kw = dtype == BFLOAT16 ? kd : (a->key_dim + 15) / 16 * 16;
            const long vw = dtype == BFLOAT16 ? vd : (a->value_dim + 15) / 16 * 16;
            /* Rows follow each other, so that those that see any of these keys do, too. Each does one thing
             * for all of them: steps of one row wait for each other, those of several do not. */
            long some = 0, end = panel;
            while (some < panel && high[some] < base) some++;
            while (end > some && low[end - 1] >= base + KEY_TILE) end--;
            for (long m = some; m < end; m++) {
                f32x16 score;
                if (level >= BIG) {
                    const float *q = query + m * kd;
                    f32x16 part[16];
                    UNROLL for (int j = 0; j < 16; j++) part[j] = (f32x16){0};
                    for (long c = 0; c < kw; c += 16) {
                        const f32x16 qv = load_f32(q + c);
                        const float *keys = key_tile + c * KEY_TILE;
                        UNROLL for (int j = 0; j < 16; j++) part[j] += qv * load_f32(keys + j * 16);
                    }
                    score = fold16(part);
                } else {
                    if ((m - some) % 2 == 0) { /* two rows take a key at a time */
                        if (m + 1 < end) score_halves(query + m * kd, kd, key_tile, kw, 2, weights[m]);
                        else score_halves(query + m * kd, kd, key_tile, kw, 1, weights[m]);
                    }
                    score = load_f32(weights[m]);
                }
                score = score * a->scaling;
                if (a->softcap > 0.0f) { /* c * tanh(s / c), by e^(-2|s/c|) */
                    f32x16 z = score * (1.0f / a->softcap);
                    f32x16 e = exp16(-2.0f * fmax16(z, -z));
                    f32x16 size = (1.0f - e) / (1.0f + e) * a->softcap;
                    score = (f32x16)((u32x16)size | ((u32x16)score & 0x80000000u));
                }
                memcpy(weights[m], &score, sizeof score);
            }
            for (long m = some; m < end; m++) {
                const int from = low[m] > base ? (int)(low[m] - base) : 0;
                const int to = high[m] < base + KEY_TILE - 1 ? (int)(high[m] - base) : KEY_TILE - 1;
                const u32x16 seen = load_u32(FROM + 16 - from) & load_u32(TO + 15 - to);
                const u32x16 minus_infinity = (u32x16)splat(-__builtin_inff());
                const f32x16 score = (f32x16)((load_u32(weights[m]) & seen) | (minus_infinity & ~seen));
                const float top = max_of(score);
                shrinks[m] = top > peak[m] ? exp1(peak[m] - top) : 1.0f; /* at first of nothing */
                if (top > peak[m]) peak[m] = top;
                const f32x16 weight = (f32x16)((u32x16)exp16(score - peak[m]) & seen);
                sum[m] = sum[m] * shrinks[m] + fold(weight);
                memcpy(weights[m], &weight, sizeof weight);
            }
            for (long m = some; m < end; m++)
                for (long c = 0; shrinks[m] != 1.0f && c < vw; c += 16) {
                    const f32x16 v = load_f32(acc + m * vd + c) * shrinks[m];
                    memcpy(acc + m * vd + c, &v, sizeof v);
                }
            for (long m = some; m < end; m++) {
                const int from = low[m] > base ? (int)(low[m] - base) : 0;
                const int to = high[m] < base + KEY_TILE - 1 ? (int)(high[m] - base) : KEY_TILE - 1;
                const float *p = weights[m];
                float *total = acc + m * vd;
                if (level >= BIG && from == 0 && to == KEY_TILE - 1) { /* weights in registers */
                    for (long c = 0; c < vw; c += 16) {
                        const float *values = value_tile + c * KEY_TILE;
                        f32x16 v = load_f32(total + c);
                        UNROLL for (int j = 0; j < KEY_TILE; j++) v += splat(p[j]) * load_f32(values + j * 16);
                        memcpy(total + c, &v, sizeof v);
                    }
                } else if (level >= BIG) {
                    for (long c = 0; c < vw; c += 16) {
                        const float *values = value_tile + c * KEY_TILE;
                        f32x16 v = load_f32(total + c);
                        for (int j = from; j <= to; j++) v += p[j] * load_f32(values + j * 16);
                        memcpy(total + c, &v, sizeof v);
                    }
                } else if (m + 1 < end && from == 0 && to == KEY_TILE - 1 &&
                           low[m + 1] <= base) { /* rows see ever later keys: so the next one sees all of these */
                    weigh_halves(p, value_tile, vw, vd, 0, KEY_TILE - 1, 2, total);
                    m++;
                } else {
                    weigh_halves(p, value_tile, vw, vd, from, to, 1, total);
                }
            }
        }
        for (long m = 0; m < panel; m++) {
            const long row = (m0 + m) / group, head = kv_head * group + (m0 + m) % group;
            pack(acc + m * vd, 1.0f / sum[m],
                 a->out + ((begin + row) * a->heads + head) * a->value_dim * width, a->value_dim, dtype);
        }
    }
}

/* Heads of keys first … last - 1, counted through all sequences. */
INLINE void attention_body(const attention_args *a, long first, long last, float *scratch, int dtype,
                           int level) {
    for (long i = first; i < last; i++) attend(a, i / a->kv_heads, i % a->kv_heads, scratch, dtype, level);
}

/* ---- RMS norm ----------------------------------------------------------------------------- */

/* y = x / sqrt(mean(x^2) + eps) * w, row by row; `early`: rounded to x's dtype before `* w` too. */
INLINE void norm_body(const char *x, const char *w, char *y, long rows, long n, float eps, int early,
                      int dtype) {
    const long width = dtype == BFLOAT16 ? 2 : 4, whole = n / 16 * 16;
    for (long r = 0; r < rows; r++, x += n * width, y += n * width) {
        const uint16_t *xb = (const uint16_t *)x, *wb = (const uint16_t *)w;
        const float *xf = (const float *)x, *wf = (const float *)w;
        float part[16] = {0}, rest = 0.0f;
        for (long i = 0; i < whole; i += 16)
            for (int j = 0; j < 16; j++) {
                const float v = dtype == BFLOAT16 ? from_bf16(xb[i + j]) : xf[i + j];
                part[j] += v * v;
            }
        for (long i = whole; i < n; i++) {
            const float v = dtype == BFLOAT16 ? from_bf16(xb[i]) : xf[i];
            rest += v * v;
        }
        const float scale = 1.0f / __builtin_sqrtf((fold(load_f32(part)) + rest) / (float)n + eps);
        for (long i = 0; i < n; i++) {
            if (dtype == BFLOAT16) {
                float v = from_bf16(xb[i]) * scale;
                if (early) v = from_bf16(to_bf16(v));
                ((uint16_t *)y)[i] = to_bf16(v * from_bf16(wb[i]));
            } else {
                ((float *)y)[i] = xf[i] * scale * wf[i];
            }
        }
    }
}

#include "program.c"

#include "pool.c"

/* ---- one copy per instruction set --------------------------------------------------------- */

typedef struct {
    const char *name;
    int (*grouped)(const grouped_args *); /* -1: no memory */
    int (*packed)(const packed_args *); /* -1: no memory */
    void (*attention)(const attention_args *, long, long, float *);
    void (*norm)(const char *, const char *, char *, long, long, float, int, int);
    int (*simple)(const int64_t *, const int64_t *); /* NO_ROW */
} kernels;

#define KERNELS(NAME, TARGET, LEVEL, CODES, FEW_OF)                                                              \
    TARGET static int grouped_##NAME(const grouped_args *a) {                                      \
        if (a->dtype == BFLOAT16) grouped_body(a, BFLOAT16, LEVEL);                                \
        else grouped_body(a, FLOAT32, LEVEL);                                                      \
        return 0;                                                                                  \
    }                                                                                              \
    TARGET static int packed_##NAME(const packed_args *a) {                                        \
        char *scratch = aligned_alloc(64, (SOME * a->k * 4 + 63) / 64 * 64);                       \
        if (!scratch) return -1;                                                                   \
        if (a->dtype == BFLOAT16) packed_body(a, scratch, BFLOAT16, LEVEL, CODES, FEW_OF);          \
        else packed_body(a, scratch, FLOAT32, LEVEL, CODES, FEW_OF);                                \
        free(scratch);                                                                             \
        return 0;                                                                                  \
    }                                                                                              \
    TARGET static void attention_##NAME(const attention_args *a, long first, long last,            \
                                        float *scratch) {                                          \
        if (a->dtype == BFLOAT16) attention_body(a, first, last, scratch, BFLOAT16, LEVEL);        \
        else attention_body(a, first, last, scratch, FLOAT32, LEVEL);                              \
    }                                                                                              \
    TARGET static void norm_##NAME(const char *x, const char *w, char *y, long rows, long n,       \
                                   float eps, int early, int dtype) {                              \
        if (dtype == BFLOAT16) norm_body(x, w, y, rows, n, eps, early, BFLOAT16);                  \
        else norm_body(x, w, y, rows, n, eps, early, FLOAT32);                                     \
    }                                                                                              \
    TARGET static int simple_##NAME(const int64_t *op, const int64_t *step) { return simple(op, step); } \
    static const kernels kernels_##NAME = {#NAME, grouped_##NAME, packed_##NAME, attention_##NAME,          \
                                            norm_##NAME, simple_##NAME};

KERNELS(portable, , SMALL, codes_portable, few_never)
#if defined(__x86_64__)
KERNELS(avx2, __attribute__((target("avx2,fma"))), HALVES, codes_avx2, few_never)
KERNELS(avx512, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,fma"))), BIG, codes_avx512, few_avx512)
#ifdef HAS_BF16
KERNELS(avx512_bf16, __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma"))),
        BIG_BF16, codes_avx512, few_avx512_bf16)
#endif
#endif

#ifdef HAS_AMX
static int grouped_amx(const grouped_args *a) {
    return a->dtype == BFLOAT16 ? amx_grouped(a) : grouped_avx512(a);
}
static int packed_amx(const packed_args *a) {
    if (a->dtype == BFLOAT16 && a->format != INT4) return amx_packed(a);
#ifdef HAS_BF16
    return packed_avx512_bf16(a); /* int4 has no tiles yet */
#else
    return packed_avx512(a);
#endif
}
static const kernels kernels_amx = {"amx", grouped_amx, packed_amx, attention_avx512, norm_avx512,
                                    simple_avx512};
#endif

static const kernels *pick(void) {
    static const kernels *chosen; /* a race writes the same value twice */
    if (chosen) return chosen;
    const kernels *best = &kernels_portable;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) best = &kernels_avx2;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
        best = &kernels_avx512;
    const kernels *wide = best;
#ifdef HAS_BF16
    if (best == &kernels_avx512 && __builtin_cpu_supports("avx512bf16")) best = &kernels_avx512_bf16;
#endif
#ifdef HAS_AMX
    if (wide == &kernels_avx512 && __builtin_cpu_supports("amx-tile") &&
        __builtin_cpu_supports("amx-bf16") && __builtin_cpu_supports("avx512bf16") && amx_granted())
        best = &kernels_amx;
#endif
    /* FLEXPERT_CPU names a lesser set: equal bits on a mixed fleet, and tests */
    const kernels *all[] = {&kernels_portable, &kernels_avx2, &kernels_avx512,
#ifdef HAS_BF16
                            &kernels_avx512_bf16,
#endif
    };
    const int count = (int)(sizeof all / sizeof *all);
    const char *forced = getenv("FLEXPERT_CPU");
    (void)wide;
    for (int i = 0; forced && i < count && all[i] != best; i++)
        if (!strcmp(forced, all[i]->name)) {
            best = all[i];
            break;
        }
#endif
    return chosen = best;
}

/* ---- what Python calls; addresses come as integers ---------------------------------------- */

static const char *fx_instruction_set(void) { return pick()->name; }

/* ---- shared by threads: rows of the weights, so that nothing that is summed is cut ----------- */

enum { TOGETHER = 64, WORTH = 1 << 21 }; /* weight rows of the smallest piece; products of two numbers */

typedef struct {
    grouped_args whole;
    packed_args packed; /* of weights in a format */
    long step;
    atomic_int failed;
} shared_product;

static void shared_piece(void *work, long piece) {
    shared_product *product = work;
    const long first = piece * product->step;
    long last = first + product->step;
    int failed;
    if (product->packed.format) {
        packed_args a = product->packed;
        a.first = first;
        a.last = last < a.n ? last : a.n;
        failed = pick()->packed(&a);
    } else {
        grouped_args a = product->whole;
        a.first = first;
        a.last = last < a.n ? last : a.n;
        failed = pick()->grouped(&a);
    }
    if (failed) atomic_store(&product->failed, failed);
}

/* rows: in all; groups: weights that any of them takes. -1: no memory */
static int share(shared_product *product, long rows, long k, long n) {
    const long blocks = (n + TOGETHER - 1) / TOGETHER;
    const long helpers = pool.wanted;
    long pieces = rows * k * n >= WORTH && helpers ? 2 * (helpers + 1) : 1;
    if (pieces > blocks) pieces = blocks;
    product->step = pieces ? (blocks + pieces - 1) / pieces * TOGETHER : TOGETHER;
    atomic_init(&product->failed, 0);
    pool_share(shared_piece, product, (n + product->step - 1) / product->step);
    return atomic_load(&product->failed);
}

static long rows_of(const int32_t *begins, const int32_t *ends, long groups) {
    long rows = 0;
    for (long g = 0; g < groups; g++)
        if (ends[g] > begins[g]) rows += ends[g] - begins[g];
    return rows;
}

/* How many threads a product may have, the caller's among them. */
static void fx_set_threads(int threads) {
    pthread_mutex_lock(&pool.lock);
    pool.wanted = threads > 1 ? threads - 1 : 0;
    pthread_mutex_unlock(&pool.lock);
}

/* Rows begins[g] … ends[g] - 1 of x times weight g, for each g. */
static int fx_grouped(const weight_table *table, intptr_t x, intptr_t begins, intptr_t ends, intptr_t y,
                      int dtype) {
    shared_product product;
    if (table->format)
        product.packed = (packed_args){
            .x = (const char *)x,
            .weights = (const intptr_t *)table->weights,
            .scales = (const intptr_t *)table->scales,
            .biases = (const intptr_t *)table->biases,
            .begins = (const int32_t *)begins,
            .ends = (const int32_t *)ends,
            .y = (char *)y,
            .groups = table->groups,
            .k = table->in_features,
            .n = table->out_features,
            .dtype = dtype,
            .format = table->format,
            .shared = table->shared,
            .fixed = table->fixed,
        };
    else
        product.packed.format = 0;
    product.whole = (grouped_args){
        .x = (const char *)x,
        .weights = (const intptr_t *)table->weights,
        .biases = (const intptr_t *)table->biases,
        .begins = (const int32_t *)begins,
        .ends = (const int32_t *)ends,
        .y = (char *)y,
        .groups = table->groups,
        .k = table->in_features,
        .n = table->out_features,
        .dtype = dtype,
    };
    const long rows = rows_of(product.whole.begins, product.whole.ends, table->groups);
    return share(&product, rows, table->in_features, table->out_features);
}

static int fx_linear(intptr_t x, intptr_t weight, intptr_t bias, intptr_t y, long rows, long k,
                     long n, int dtype) {
    /* offsets are 32-bit; walk in pieces that fit */
    const long width = dtype == BFLOAT16 ? 2 : 4, most = 1 << 30;
    const weight_table one = {
        .weights = (intptr_t)&weight,
        .biases = bias ? (intptr_t)&bias : 0,
        .groups = 1,
        .in_features = k,
        .out_features = n,
    };
    for (long r = 0; r < rows; r += most) {
        const int32_t offsets[2] = {0, (int32_t)(rows - r < most ? rows - r : most)};
        if (fx_grouped(&one, x + r * k * width, (intptr_t)offsets, (intptr_t)(offsets + 1),
                       y + r * n * width, dtype))
            return -1;
    }
    return 0;
}

static void fx_rms_norm(intptr_t x, intptr_t w, intptr_t y, long rows, long n, float eps, int early,
                        int dtype) {
    pick()->norm((const char *)x, (const char *)w, (char *)y, rows, n, eps, early, dtype);
}

typedef struct {
    const attention_args *of;
    long all, step;
    atomic_int failed;
} shared_attention;

static void attention_piece(void *work, long piece) {
    shared_attention *attention = work;
    const long first = piece * attention->step, last = first + attention->step;
    float *scratch = aligned_alloc(64, attention_scratch(attention->of));
    if (!scratch) {
        atomic_store(&attention->failed, -1);
        return;
    }
    pick()->attention(attention->of, first, last < attention->all ? last : attention->all, scratch);
    free(scratch);
}

static int attend_all(const attention_args *a) {
    shared_attention attention = {.of = a, .all = a->sequences * a->kv_heads};
    long work = 0, pieces = 1;
    for (long s = 0; s < a->sequences; s++)
        work += (a->query_start[s + 1] - a->query_start[s]) * (long)a->context_len[s];
    work *= a->heads * (a->key_dim + a->value_dim);
    if (work >= WORTH && pool.wanted) pieces = 4 * (pool.wanted + 1);
    if (pieces > attention.all) pieces = attention.all;
    if (pieces < 1) return 0;
    attention.step = (attention.all + pieces - 1) / pieces;
    atomic_init(&attention.failed, 0);
    store_kv(a);
    pool_share(attention_piece, &attention, (attention.all + attention.step - 1) / attention.step);
    return atomic_load(&attention.failed);
}

static int fx_paged_attention(intptr_t query, intptr_t key, intptr_t value, intptr_t key_cache,
                              intptr_t value_cache, intptr_t query_start, intptr_t context_len,
                              intptr_t block_tables, intptr_t slot_mapping, intptr_t sinks,
                              intptr_t out, long qs0, long qs1, long ks0, long ks1, long vs0,
                              long vs1, long sequences, long max_blocks, long block_size, long heads,
                              long kv_heads, long key_dim, long value_dim, long value_row, long window,
                              float scaling, float softcap, int dtype) {
    const attention_args a = {
        .query = (const char *)query,
        .key = (const char *)key,
        .value = (const char *)value,
        .key_cache = (char *)key_cache,
        .value_cache = (char *)value_cache,
        .query_start = (const int32_t *)query_start,
        .context_len = (const int32_t *)context_len,
        .block_tables = (const int32_t *)block_tables,
        .slot_mapping = (const int64_t *)slot_mapping,
        .sinks = (const char *)sinks,
        .out = (char *)out,
        .query_stride = {qs0, qs1},
        .key_stride = {ks0, ks1},
        .value_stride = {vs0, vs1},
        .sequences = sequences,
        .max_blocks = max_blocks,
        .block_size = block_size,
        .heads = heads,
        .kv_heads = kv_heads,
        .key_dim = key_dim,
        .value_dim = value_dim,
        .value_row = value_row,
        .window = window,
        .scaling = scaling,
        .softcap = softcap,
        .dtype = dtype,
    };
    return attend_all(&a);
}

#include "experts.c"

/* One operation of a program but a layer of experts; NO_ROOM or NO_ROW where that fails. */
static int operate(const kernels *here, const int64_t *op, const int64_t *step) {
    if (op[AT_OP] == OP_LINEAR)
        return fx_linear(op[AT_A], op[AT_B], op[AT_EXTRA], op[AT_OUT], op[AT_SIZES], op[AT_SIZES + 1],
                         op[AT_SIZES + 2], (int)op[AT_DTYPES]);
    if (op[AT_OP] == OP_ATTENTION) {
        const attention_args a = attention_of(op, step);
        return attend_all(&a);
    }
    if (op[AT_OP] != OP_NORM) return here->simple(op, step);
    here->norm((const char *)op[AT_A], (const char *)op[AT_B], (char *)op[AT_OUT], op[AT_SIZES],
               op[AT_SIZES + 1], (float)scalar_of(op, AT_SCALAR), (int)op[AT_EXTRA], (int)op[AT_DTYPES]);
    return 0;
}

/* Operations first … last - 1 of a program (program.c), as far as Python need not be asked: the one that
 * is next; last: all are done. NO_ROOM, NO_ROW or FX_STOPPED where one fails. */
static long fx_run(intptr_t program, long first, long last, intptr_t step) {
    const kernels *here = pick();
    const int64_t *now = (const int64_t *)step;
    for (long i = first; i < last; i++) {
        const int64_t *op = (const int64_t *)program + i * WIDTH;
        const int how = op[AT_OP] == OP_EXPERTS ? walk_experts(op, (moe_step *)now[STEP_MOE])
                                                : operate(here, op, now);
        if (how == FX_LEFT) return i;
        if (how) return how;
    }
    return last;
}
