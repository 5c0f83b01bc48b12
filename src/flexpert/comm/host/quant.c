/* fp8 with one scale for 128 channels; quant.py says what and why. Compiled after kernels.c, whose
 * conversions it uses. A row is hidden bytes of e4m3, then its scales. */

/* cdef: begin */
void fx_quantise(uintptr_t x, int dtype, int64_t tokens, int hidden, int scales, uintptr_t out,
                 int64_t out_stride);
void fx_dequantise(uintptr_t in, int64_t in_stride, int64_t tokens, int hidden, int scales,
                   int dtype, uintptr_t out);
/* cdef: end */

enum { FX_SCALE_FLOAT32 = 0, FX_SCALE_POWER2 = 1, FX_SCALE_UE8M0 = 2 };

#define FX_QUANT_BLOCK 128

/* all ones if a < b, for bit patterns of numbers that are not negative: no branch, so it vectorises */
static inline uint32_t if_less(uint32_t a, uint32_t b) { return (uint32_t)((int32_t)(a - b) >> 31); }

static inline uint32_t choose(uint32_t mask, uint32_t yes, uint32_t no) {
    return no ^ ((yes ^ no) & mask);
}

/* round to nearest even, saturate; no infinities in e4m3fn, NaN is 0x7F */
static inline uint8_t to_e4m3(uint32_t bits) {
    uint32_t sign = (bits >> 24) & 0x80u, magnitude = bits & 0x7FFFFFFFu;
    uint32_t normal = ((magnitude + 0x7FFFFu + ((magnitude >> 20) & 1u)) >> 20) - (120u << 3);
    /* below 2^-6: steps of 2^-9, which is what float32 has just above 2^14 */
    uint32_t small = float_to_bits(bits_to_float(magnitude) + 16384.0f) - 0x46800000u;
    uint32_t code = choose(if_less(magnitude, 0x3C800000u), small, normal);
    code = choose(if_less(0x43E00000u, magnitude), 0x7Eu, code);
    code = choose(if_less(0x7F800000u, magnitude), 0x7Fu, code);
    return (uint8_t)(sign | code);
}

static inline float from_e4m3(uint8_t q) {
    uint32_t magnitude = q & 0x7Fu, sign = (uint32_t)(q & 0x80u) << 24;
    uint32_t normal = (magnitude << 20) + (120u << 23);
    uint32_t small = float_to_bits((float)(int32_t)magnitude * 0x1.0p-9f);
    uint32_t value = choose(if_less(magnitude, 8u), small, normal);
    value = choose(if_less(0x7Eu, magnitude), 0x7FC00000u, value);
    return bits_to_float(value | sign);
}

/* the scale of a block and what to multiply with; `amax` is finite */
static void scale_of(float amax, int kind, float *scale, float *inverse) {
    amax = amax < 1e-4f ? 1e-4f : amax;
    *scale = amax / 448.0f;
    *inverse = 448.0f / amax;
    if (kind == FX_SCALE_FLOAT32) return;
    uint32_t bits = float_to_bits(*scale);
    uint32_t exponent = (bits >> 23) + ((bits & 0x7FFFFFu) != 0);
    *scale = bits_to_float(exponent << 23);
    *inverse = bits_to_float((254u - exponent) << 23);
}

/* Of a product, the upper half holds all that rounding to e4m3 looks at, if its last bit says
 * whether anything was cut off: so the rest is done in 16 bits, twice as many at a time. */
static inline uint16_t upper_half(float value) {
    uint32_t bits = float_to_bits(value);
    return (uint16_t)((bits | ((bits & 0xFFFFu) + 0xFFFFu)) >> 16);
}

/* Of a number that needs no saturating, or less than 2^-10, which is 0. */
static inline uint8_t normal_to_e4m3(uint16_t half) {
    uint16_t magnitude = half & 0x7FFFu;
    int16_t code = (int16_t)(((uint16_t)(magnitude + 7u + (magnitude >> 4 & 1u)) >> 4) - (120 << 3));
    code = code < 0 ? 0 : code;
    return (uint8_t)(code | (half >> 8 & 0x80u));
}

/* 2^-10 <= value < 2^-6, where e4m3 has fixed steps */
static inline uint16_t is_small(uint16_t half) {
    return (uint16_t)((half & 0x7FFFu) - 0x3A80u) < 0x0200u;
}

#define FX_QUANTISE(name, type, load, bits, most_of, inf)                                                             \
    FX_CLONES static void name(const uint8_t *in, int hidden, int kind, uint8_t *restrict out) {  \
        for (int at = 0; at < hidden; at += FX_QUANT_BLOCK) {                                     \
            const type *row = (const type *)in + at;                                              \
            uint8_t *to = out + at; /* not out[at + i]: with -fwrapv, that is not vectorised */   \
            uint16_t half[FX_QUANT_BLOCK], small = 0;                                             \
            float scale, inverse;                                                                 \
            bits most = 0;                                                                        \
            for (int i = 0; i < FX_QUANT_BLOCK; i++) {                                            \
                bits magnitude = ((const bits *)row)[i] & most_of;                                \
                most = magnitude > most ? magnitude : most;                                       \
            }                                                                                     \
            int whole = most < inf;                                                               \
            if (!whole) {                                                                         \
                most = 0;                                                                         \
                for (int i = 0; i < FX_QUANT_BLOCK; i++) {                                        \
                    bits magnitude = ((const bits *)row)[i] & most_of;                            \
                    if (magnitude < inf && magnitude > most) most = magnitude;                    \
                }                                                                                 \
            }                                                                                     \
            type largest;                                                                         \
            memcpy(&largest, &most, sizeof largest);                                              \
            scale_of(load(largest), kind, &scale, &inverse);                                      \
            for (int i = 0; i < FX_QUANT_BLOCK; i++) half[i] = upper_half(load(row[i]) * inverse); \
            for (int i = 0; i < FX_QUANT_BLOCK; i++) {                                            \
                small |= is_small(half[i]);                                                       \
                to[i] = normal_to_e4m3(half[i]);                                                  \
            }                                                                                     \
            if (small || !whole) /* seldom */                                             \
                for (int i = 0; i < FX_QUANT_BLOCK; i++) {                                        \
                    uint32_t given = float_to_bits(load(row[i]));                                 \
                    uint32_t finite = if_less(given & 0x7FFFFFFFu, 0x7F800000u);                  \
                    uint32_t scaled = float_to_bits(load(row[i]) * inverse);                      \
                    to[i] = to_e4m3(choose(finite, scaled, given | 0x7FC00000u));                 \
                }                                                                                 \
            int block = at / FX_QUANT_BLOCK;                                                      \
            if (kind == FX_SCALE_UE8M0)                                                           \
                out[hidden + block] = (uint8_t)(float_to_bits(scale) >> 23);                      \
            else                                                                                  \
                memcpy(out + hidden + 4 * block, &scale, sizeof scale);                           \
        }                                                                                         \
    }

FX_QUANTISE(quantise_bf16, uint16_t, from_bf16, uint16_t, 0x7FFFu, 0x7F80u)
FX_QUANTISE(quantise_fp16, uint16_t, from_fp16, uint16_t, 0x7FFFu, 0x7C00u)
FX_QUANTISE(quantise_fp32, float, from_fp32, uint32_t, 0x7FFFFFFFu, 0x7F800000u)

#define FX_DEQUANTISE(name, type, store)                                                          \
    FX_CLONES static void name(const uint8_t *restrict in, int hidden, int kind, uint8_t *to) {   \
        for (int at = 0; at < hidden; at += FX_QUANT_BLOCK) {                                     \
            type *restrict row = (type *)to + at;                                                 \
            const uint8_t *codes = in + at;                                                       \
            int block = at / FX_QUANT_BLOCK;                                                      \
            float scale;                                                                          \
            if (kind == FX_SCALE_UE8M0)                                                           \
                scale = bits_to_float((uint32_t)in[hidden + block] << 23);                        \
            else                                                                                  \
                memcpy(&scale, in + hidden + 4 * block, sizeof scale);                            \
            for (int i = 0; i < FX_QUANT_BLOCK; i++)                                              \
                row[i] = store(from_e4m3(codes[i]) * scale);                                      \
        }                                                                                         \
    }

FX_DEQUANTISE(dequantise_bf16, uint16_t, to_bf16)
FX_DEQUANTISE(dequantise_fp16, uint16_t, to_fp16)
FX_DEQUANTISE(dequantise_fp32, float, to_fp32)

void fx_quantise(uintptr_t x, int dtype, int64_t tokens, int hidden, int scales, uintptr_t out,
                 int64_t out_stride) {
    int64_t in_stride = (int64_t)hidden * (dtype == FX_FP32 ? 4 : 2);
    for (int64_t t = 0; t < tokens; t++) {
        const uint8_t *in = (const uint8_t *)x + t * in_stride;
        uint8_t *row = (uint8_t *)out + t * out_stride;
        if (dtype == FX_BF16)
            quantise_bf16(in, hidden, scales, row);
        else if (dtype == FX_FP16)
            quantise_fp16(in, hidden, scales, row);
        else
            quantise_fp32(in, hidden, scales, row);
    }
}

void fx_dequantise(uintptr_t in, int64_t in_stride, int64_t tokens, int hidden, int scales,
                   int dtype, uintptr_t out) {
    int64_t out_stride = (int64_t)hidden * (dtype == FX_FP32 ? 4 : 2);
    for (int64_t t = 0; t < tokens; t++) {
        const uint8_t *row = (const uint8_t *)in + t * in_stride;
        uint8_t *to = (uint8_t *)out + t * out_stride;
        if (dtype == FX_BF16)
            dequantise_bf16(row, hidden, scales, to);
        else if (dtype == FX_FP16)
            dequantise_fp16(row, hidden, scales, to);
        else
            dequantise_fp32(row, hidden, scales, to);
    }
}
