// A step of few tokens through a transformer's layers, and through its head, on the CPU.
//
// native.py compiles it for one machine, with the dtypes of the weights and of the KV cache:
// WEIGHT_DTYPE and KV_DTYPE, each one of the three below, and QUANTISED, which is 1 for matrices of
// 8 and 4 bits (quantised.py has their layout) in a model of WEIGHT_DTYPE, otherwise 0. Results are
// rounded to that dtype where model.py rounds them; all between two roundings is in float32. A
// result does not depend on the number of threads, nor on the other tokens of the step.

#include <math.h>
#include <atomic>
#include <initializer_list>
#include <memory>
#include <omp.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#else
#define LANES 8
#endif

#define FLOAT32 0
#define BFLOAT16 1
#define FLOAT16 2

typedef float Floats __attribute__((vector_size(4 * LANES), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint32_t Words __attribute__((vector_size(4 * LANES), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(2 * LANES), aligned(2)));
typedef int8_t Bytes __attribute__((vector_size(LANES), aligned(1)));

struct bfloat16 { uint16_t bits; };
struct float16 { uint16_t bits; };

// ---- Numbers: to float32, one or LANES at a time, and back with one rounding.

static inline float wide(float x) { return x; }
static inline float wide(bfloat16 x) {
    uint32_t bits = (uint32_t)x.bits << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}
static inline float wide(float16 x) {
    _Float16 half;
    memcpy(&half, &x, 2);
    return (float)half;
}

static inline float wide(int8_t x) { return x; }

static inline Floats load(const float *at) { return *(const Floats *)at; }
static inline Floats load(const bfloat16 *at) {
    return (Floats)(__builtin_convertvector(*(const Halves *)at, Words) << 16);
}
static inline Floats load(const float16 *at) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)at));
#elif defined(__F16C__)
    return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)at));
#else
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = wide(at[i]);
    return out;
#endif
}

static inline Floats widened(Bytes x) {
#if defined(__AVX512F__)
    return (Floats)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)x));
#elif defined(__AVX2__)
    int64_t bytes;
    memcpy(&bytes, &x, 8);
    return (Floats)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_cvtsi64_si128(bytes)));
#else
    Floats out;
    for (int i = 0; i < LANES; i++) out[i] = x[i];
    return out;
#endif
}
static inline Floats load(const int8_t *at) { return widened(*(const Bytes *)at); }

static inline void put(float *at, float x) { *at = x; }
static inline void put(bfloat16 *at, float x) {
    uint32_t bits;
    memcpy(&bits, &x, 4);
    at->bits = x != x ? 0x7fc0 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline void put(float16 *at, float x) {
    _Float16 half = (_Float16)x;
    memcpy(at, &half, 2);
}

#if WEIGHT_DTYPE == FLOAT32
typedef float Weight;
#elif WEIGHT_DTYPE == BFLOAT16
typedef bfloat16 Weight;
#else
typedef float16 Weight;
#endif
#if KV_DTYPE == FLOAT32
typedef float Cached;
#elif KV_DTYPE == BFLOAT16
typedef bfloat16 Cached;
#else
typedef float16 Cached;
#endif

static inline float rounded(float x) {
    Weight narrow;
    put(&narrow, x);
    return wide(narrow);
}

// The sums of four vectors' elements. Halves are added, then their halves, and so on.
static inline void sums(Floats a, Floats b, Floats c, Floats d, float *out) {
#if LANES == 16
    const Ints low = {0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23};
    Floats ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 8);
    Floats cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, low + 8);
    const Ints quarter = {0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27};
    const Ints pairs = {2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13};
    const Ints ones = {1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14};
    Floats all = __builtin_shuffle(ab, cd, quarter) + __builtin_shuffle(ab, cd, quarter + 4);
#else
    const Ints low = {0, 1, 2, 3, 8, 9, 10, 11};
    Floats ab = __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, low + 4);
    Floats cd = __builtin_shuffle(c, d, low) + __builtin_shuffle(c, d, low + 4);
    const Ints quarter = {0, 1, 4, 5, 8, 9, 12, 13};
    const Ints ones = {1, 0, 3, 2, 5, 4, 7, 6};
    Floats all = __builtin_shuffle(ab, cd, quarter) + __builtin_shuffle(ab, cd, quarter + 2);
#endif
#if LANES == 16
    all += __builtin_shuffle(all, pairs);
#endif
    all += __builtin_shuffle(all, ones);
    for (int i = 0; i < 4; i++) out[i] = all[i * LANES / 4];
}

static inline float sum(Floats x) {
    float out[4];
    sums(x, x, x, x, out);
    return out[0];
}

// e to the x, for x <= 0 or NaN, within 2 ulp: a power of two times a polynomial, as in Cephes.
static inline Floats exponential(Floats x) {
    Floats least = (Floats){} - 87.0f;
    Floats at = (x < least) ? least : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    Floats scaled = at * 1.44269504088896341f + magic;
    Floats n = scaled - magic;
    Floats r = at - n * 0.693359375f + n * 2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * (r * r) + r + 1.0f;
    Floats power = (Floats)(((Ints)scaled - (0x4b400000 - 127)) << 23);
    return (x == x) ? y * power : x;
}

static inline float exponential(float x) { return exponential((Floats){} + x)[0]; }

// ---- What native.py passes: the structures there have the same fields.

struct Matrix {
    const void *weight;    // [rows, columns] of Weight or, QUANTISED, of int8 or in tiles of 4 bits
    const Weight *scales;  // QUANTISED: [rows], or of 4 bits [columns / GROUP, tiles * tile, 2]
    const Weight *bias;    // [rows], or null
    int64_t rows, columns;
    int64_t tile;  // rows of a tile of 4 bits, 32 or 64; otherwise 1
};

struct Layer {
    const Weight *attn_norm, *mlp_norm;
    const Weight *q_norm, *k_norm;  // [head_dim], or null
    Matrix q, k, v, o, gate, up, down;
    Cached *keys, *values;  // [slots, kv_heads, head_dim]
    int64_t window;         // 0: none
};

struct Model {
    int64_t hidden, heads, kv_heads, head_dim, inner, page_size, threads;
    float eps;
};

struct Step {
    int64_t tokens, sequences, max_pages;
    const float *angles;          // [tokens, head_dim / 2], by which heads are rotated
    const int64_t *slots;         // [tokens]
    const int32_t *query_starts;  // [sequences + 1]
    const int32_t *lengths;       // [sequences]
    const int32_t *block_table;   // [sequences, max_pages]
    float scale;                  // of the angles' cosines and sines
};

// ---- Matrix products.

#if defined(__AVX512BF16__) && WEIGHT_DTYPE == BFLOAT16 && !QUANTISED
#define DIRECT 1  // weights are multiplied as they are, with bfloat16
typedef bfloat16 Operand;
#else
typedef float Operand;
#endif
#if defined(__AVX512BF16__) && defined(__AVX512VBMI__) && WEIGHT_DTYPE == BFLOAT16 && QUANTISED
#define NARROW 1  // weights of 4 bits become bfloat16, which holds them, and so are operands
#endif
#if QUANTISED
typedef int8_t Stored;
const int CHAINS = 2;  // sums of a product that grow side by side: one would wait for itself
const int TOKENS = 4;  // most tokens whose products are computed together
#else
typedef Weight Stored;
const int CHAINS = 1;
const int TOKENS = 8;
#endif

const int ROWS = 2, ROW_BY_ROW = 4, MAX_TOKENS = 48;

struct Range { int64_t start, stop; };

// A thread's part of some units.
static inline Range share(int64_t units, int64_t parts, int64_t part) {
    return {units * part / parts, units * (part + 1) / parts};
}

// What matrices are multiplied with: rows of values of the weights' dtype.
struct Operands {
    Operand *values;
#if NARROW
    bfloat16 *narrow;  // the same
#endif
    void set(int64_t i, float x) const {
#if DIRECT
        put(values + i, x);
#else
        values[i] = rounded(x);
#endif
#if NARROW
        put(narrow + i, x);
#endif
    }
};

static inline Floats joined(const Floats *parts) {
    return CHAINS == 1 ? parts[0] : parts[0] + parts[CHAINS - 1];
}

// Products of R rows with T tokens (1, or a multiple of 4): out [R, MAX_TOKENS]. The terms of a sum
// are added in the same order whatever R and T are.
template <int R, int T>
static inline void dots(const Stored *weight, const Operand *x, int64_t n, float *out) {
    Floats acc[R][T][CHAINS] = {};
    int64_t i = 0;
#if DIRECT
    for (; i + 32 <= n; i += 32) {
        __m512bh a[T];
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) a[t] = (__m512bh)_mm512_loadu_si512(x + t * n + i);
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) {
            if (T > 1) __builtin_prefetch(weight + (r + R) * n + i);
            __m512bh w = (__m512bh)_mm512_loadu_si512(weight + r * n + i);
#pragma GCC unroll 8
            for (int t = 0; t < T; t++)
                acc[r][t][0] = (Floats)_mm512_dpbf16_ps((__m512)acc[r][t][0], w, a[t]);
        }
    }
#else
    for (; i + CHAINS * LANES <= n; i += CHAINS * LANES) {
#pragma GCC unroll 8
        for (int r = 0; r < R; r++)
            if (T > 1) __builtin_prefetch(weight + (r + R) * n + i);
#pragma GCC unroll 8
        for (int c = 0; c < CHAINS; c++) {
            Floats a[T];
#pragma GCC unroll 8
            for (int t = 0; t < T; t++) a[t] = load(x + t * n + i + c * LANES);
#pragma GCC unroll 8
            for (int r = 0; r < R; r++) {
                Floats w = load(weight + r * n + i + c * LANES);
#pragma GCC unroll 8
                for (int t = 0; t < T; t++) acc[r][t][c] += w * a[t];
            }
        }
    }
#endif
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
        float total[T];
        if (T % 4) {
            total[0] = sum(joined(acc[r][0]));
        } else {
#pragma GCC unroll 8
            for (int t = 0; t < T; t += 4)
                sums(joined(acc[r][t]), joined(acc[r][t + 1]), joined(acc[r][t + 2]),
                     joined(acc[r][t + 3]), total + t);
        }
        for (int t = 0; t < T; t++) {
            for (int64_t j = i; j < n; j++)
                total[t] += wide(weight[r * n + j]) * wide(x[t * n + j]);
            out[r * MAX_TOKENS + t] = total[t];
        }
    }
}

// R rows of a product for all tokens: out [R, MAX_TOKENS].
template <int R>
static void rows_of(const Matrix &m, int64_t row, const Operand *x, int64_t tokens, float *out) {
    const Stored *weight = (const Stored *)m.weight + row * m.columns;
    int64_t t = 0, n = m.columns;
    for (; t + TOKENS <= tokens; t += TOKENS) dots<R, TOKENS>(weight, x + t * n, n, out + t);
    for (; t + 4 <= tokens; t += 4) dots<R, 4>(weight, x + t * n, n, out + t);
    for (; t < tokens; t++) dots<R, 1>(weight, x + t * n, n, out + t);
}

#if QUANTISED
const int GROUPED = 32;  // weights that share a scale and a zero point in 4 bits
const int MAX_TILE = 64;

// Scales and zero points of LANES rows, which alternate.
template <class T>
static inline void pairs(const T *at, Floats &scale, Floats &zero) {
    Ints even;
    for (int i = 0; i < LANES; i++) even[i] = 2 * i;
    scale = __builtin_shuffle(load(at), load(at + LANES), even);
    zero = __builtin_shuffle(load(at), load(at + LANES), even + 1);
}
static inline void pairs(const bfloat16 *at, Floats &scale, Floats &zero) {
    Words both = *(const Words *)at;
    scale = (Floats)(both << 16);
    zero = (Floats)(both & 0xffff0000u);
}

// The low and the high halves of LANES bytes, less 8.
static inline void nibbles(const int8_t *at, Floats &low, Floats &high) {
#if defined(__AVX512F__)
    const Floats values = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
    __m512i both = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)at));
    low = (Floats)_mm512_permutexvar_ps(both, (__m512)values);
    high = (Floats)_mm512_permutexvar_ps(_mm512_srli_epi32(both, 4), (__m512)values);
#else
    Bytes both = *(const Bytes *)at;
    low = widened((both & 15) - 8);
    high = widened(((both >> 4) & 15) - 8);
#endif
}

// For GROUPED columns of a tile, at, and of T rows of x, [T, stride] from i on: the products' sums
// for the tile's rows, [T, TILE / LANES], and the sums of x.
template <int TILE, int T>
static inline void group_of(const int8_t *at, const Operands &x, int64_t i, int64_t stride,
                            Floats (*group)[TILE / LANES], float *total) {
    const int PARTS = TILE / LANES;  // the first half of them in the low halves of the bytes
    for (int k = 0; k < GROUPED; k++, at += TILE / 2) {
        Floats w[PARTS];
#pragma GCC unroll 8
        for (int p = 0; p < PARTS / 2; p++)
            nibbles(at + p * LANES, w[p], w[PARTS / 2 + p]);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            float value = x.values[t * stride + i + k];
            total[t] += value;
#pragma GCC unroll 8
            for (int p = 0; p < PARTS; p++) group[t][p] += value * w[p];
        }
    }
}

#if NARROW
// The same for tiles of 64, two columns at a time: their bytes are brought together in 32 bits for
// each row, and each half of a byte becomes a bfloat16.
template <int T>
static inline void group_of_64(const int8_t *at, const Operands &x, int64_t i, int64_t stride,
                               Floats (*group)[4], float *total) {
    static const struct Constants {
        uint16_t values[32];
        uint8_t order[2][64];
        Constants() {
            for (int v = 0; v < 32; v++) {
                bfloat16 value;
                put(&value, (v & 15) - 8);  // bit 4 of an index is that of another half: ignored
                values[v] = value.bits;
            }
            for (int half = 0; half < 2; half++)
                for (int byte = 0; byte < 64; byte++)
                    order[half][byte] = byte / 2 % 2 * 32 + half * 16 + byte / 4;
        }
    } constants;
    const __m512i values = _mm512_loadu_si512(constants.values);
    const __m512i first = _mm512_loadu_si512(constants.order[0]);
    const __m512i second = _mm512_loadu_si512(constants.order[1]);
    const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
#pragma GCC unroll 8
    for (int t = 0; t < T; t++) {
        __m512bh operands = (__m512bh)_mm512_loadu_si512(x.narrow + t * stride + i);
        total[t] = sum((Floats)_mm512_dpbf16_ps(_mm512_setzero_ps(), operands, ones));
    }
    for (int k = 0; k < GROUPED; k += 2, at += 64) {
        __m512i bytes = _mm512_loadu_si512(at), w[4];
        w[0] = _mm512_permutexvar_epi8(first, bytes);
        w[1] = _mm512_permutexvar_epi8(second, bytes);
        w[2] = _mm512_srli_epi16(w[0], 4);
        w[3] = _mm512_srli_epi16(w[1], 4);
#pragma GCC unroll 8
        for (int p = 0; p < 4; p++) w[p] = _mm512_permutexvar_epi16(w[p], values);
#pragma GCC unroll 8
        for (int t = 0; t < T; t++) {
            int32_t pair;
            memcpy(&pair, x.narrow + t * stride + i + k, sizeof pair);
            __m512bh operands = (__m512bh)_mm512_set1_epi32(pair);
#pragma GCC unroll 8
            for (int p = 0; p < 4; p++)
                group[t][p] =
                    (Floats)_mm512_dpbf16_ps((__m512)group[t][p], (__m512bh)w[p], operands);
        }
    }
}
#endif

// A tile of 4 bits, TILE rows, times T tokens from t on: out [TILE, MAX_TOKENS].
template <int TILE, int T>
static void tile_of(const Matrix &m, int64_t tile, const Operands &x, int64_t t, float *out) {
    const int PARTS = TILE / LANES;
    const int8_t *packed = (const int8_t *)m.weight + tile * m.columns * (TILE / 2);
    const int64_t padded = (m.rows + MAX_TILE - 1) / MAX_TILE * MAX_TILE;
    Floats acc[T][PARTS] = {};
    for (int64_t start = 0; start < m.columns; start += GROUPED) {
        Floats group[T][PARTS] = {};
        float total[T] = {};
        const int8_t *at = packed + start * (TILE / 2);
#if NARROW
        if constexpr (TILE == 64)
            group_of_64<T>(at, x, t * m.columns + start, m.columns, group, total);
        else
#endif
            group_of<TILE, T>(at, x, t * m.columns + start, m.columns, group, total);
        const Weight *scales = m.scales + 2 * (start / GROUPED * padded + tile * TILE);
#pragma GCC unroll 8
        for (int p = 0; p < PARTS; p++) {
            Floats scale, zero;
            pairs(scales + 2 * p * LANES, scale, zero);
#pragma GCC unroll 8
            for (int n = 0; n < T; n++) acc[n][p] += scale * group[n][p] + zero * total[n];
        }
    }
    for (int n = 0; n < T; n++)
        for (int p = 0; p < PARTS; p++)
            for (int i = 0; i < LANES; i++)
                out[(p * LANES + i) * MAX_TOKENS + t + n] = acc[n][p][i];
}

template <int TILE>
static void rows_of_tile(const Matrix &m, int64_t tile, const Operands &x, int64_t tokens,
                         float *out) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) tile_of<TILE, 4>(m, tile, x, t, out);
    for (; t < tokens; t++) tile_of<TILE, 1>(m, tile, x, t, out);
}
#else
const int MAX_TILE = 1;
#endif

// The rows of a product are computed in units of one row or one tile.
static inline int64_t units_of(const Matrix &m) { return (m.rows + m.tile - 1) / m.tile; }

// Calls emit(row, tokens' values, rounded) for the rows of some units of a product.
template <class Emit>
static void product(const Matrix &m, int64_t start, int64_t stop, const Operands &x,
                    int64_t tokens, Emit emit) {
    float out[(ROWS > MAX_TILE ? ROWS : MAX_TILE) * MAX_TOKENS];
    auto finish = [&](int64_t row, int64_t rows) {
        for (int64_t r = 0; r < rows && row + r < m.rows; r++) {
            float *values = out + r * MAX_TOKENS;
            float scale = QUANTISED && m.tile == 1 ? wide(m.scales[row + r]) : 1.0f;
            float bias = m.bias ? wide(m.bias[row + r]) : 0.0f;
            for (int64_t t = 0; t < tokens; t++) values[t] = rounded(values[t] * scale + bias);
            emit(row + r, values);
        }
    };
#if QUANTISED
    if (m.tile > 1) {
        for (int64_t tile = start; tile < stop; tile++) {
            (m.tile == 64 ? rows_of_tile<64> : rows_of_tile<32>)(m, tile, x, tokens, out);
            finish(tile * m.tile, m.tile);
        }
        return;
    }
#endif
    int64_t row = start;
    // Memory is read fastest row by row; two rows together save loads where arithmetic is limiting.
    for (; tokens > ROW_BY_ROW && row + ROWS <= stop; row += ROWS) {
        rows_of<ROWS>(m, row, x.values, tokens, out);
        finish(row, ROWS);
    }
    for (; row < stop; row++) {
        rows_of<1>(m, row, x.values, tokens, out);
        finish(row, 1);
    }
}

// ---- Norms, rotary embedding, attention.

template <class T>
static float inverse_rms(const T *x, int64_t n, float eps) {
    Floats squares = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < n; i++) total += wide(x[i]) * wide(x[i]);
    return 1.0f / sqrtf(total / n + eps);
}

// Row t of x [tokens, n] and of out.
static void norm(const Weight *x, int64_t t, const Weight *weight, int64_t n, float eps,
                 const Operands &out) {
    float scale = inverse_rms(x + t * n, n, eps);
    for (int64_t i = 0; i < n; i++)
        out.set(t * n + i, rounded(wide(x[t * n + i]) * scale) * wide(weight[i]));
}

// SiLU of gate, rounded, times up, from start to stop.
static void activate(const float *gate, const float *up, int64_t start, int64_t stop,
                     const Operands &out) {
    for (int64_t i = start; i < stop; i += LANES) {
        int64_t count = stop - i < LANES ? stop - i : LANES;
        Floats x = {};
        if (count == LANES)
            x = load(gate + i);
        else
            memcpy(&x, gate + i, count * sizeof(float));
        Floats e = exponential((x < 0.0f) ? x : -x);
        Floats y = x * ((x < 0.0f ? e : (Floats){} + 1.0f) / (1.0f + e));
        for (int64_t j = 0; j < count; j++) out.set(i + j, rounded(y[j]) * up[i + j]);
    }
}

// Normalises a head in place, if there is a weight, and rotates it into out.
static void rotate_head(float *x, const Weight *weight, const float *cos, const float *sin,
                        int64_t n, float eps, float *out) {
    if (weight) {
        float scale = inverse_rms(x, n, eps);
        for (int64_t i = 0; i < n; i++) x[i] = rounded(rounded(x[i] * scale) * wide(weight[i]));
    }
    const int64_t half = n / 2;
    for (int64_t i = 0; i < half; i++) {
        out[i] = rounded(x[i] * cos[i] - x[i + half] * sin[i]);
        out[i + half] = rounded(x[i + half] * cos[i] + x[i] * sin[i]);
    }
}

const int CHUNK = 128;  // keys that one thread attends to before it may be another one's turn
const int AHEAD = 8;    // keys that are on their way from memory
const int GROUP = 4;    // most query heads of a KV head that are computed together

// A cache is read in short pieces, which the CPU does not foresee.
static inline void prefetch(const Cached *at, int64_t n) {
    for (int64_t i = 0; i < n * (int64_t)sizeof(Cached); i += 64)
        __builtin_prefetch((const char *)at + i);
}

// For G query heads, the scores of some keys: score [G, CHUNK]. Fetches the values on the way.
template <int G>
static inline void scores(const float *q, int64_t n, const Cached *const *keys,
                          const Cached *const *values, int64_t count, int64_t fetch,
                          float (*score)[CHUNK]) {
    const float scale = 1.0f / sqrtf((float)n);
#if defined(__AVX512BF16__) && WEIGHT_DTYPE == BFLOAT16 && KV_DTYPE == BFLOAT16
    bfloat16 query[G * n];
    for (int64_t i = 0; i < G * n; i++) put(query + i, q[i]);
#endif
    for (int64_t j = 0; j < count; j += 4) {
        const Cached *key[4];
        for (int k = 0; k < 4; k++) {
            key[k] = keys[j + k < count ? j + k : count - 1];
            prefetch(keys[j + k + AHEAD < count ? j + k + AHEAD : count - 1], fetch);
            prefetch(values[j + k < count ? j + k : count - 1], fetch);
        }
        Floats acc[G][4] = {};
        int64_t i = 0;
#if defined(__AVX512BF16__) && WEIGHT_DTYPE == BFLOAT16 && KV_DTYPE == BFLOAT16
        for (; i + 32 <= n; i += 32) {
            __m512bh a[4];
#pragma GCC unroll 8
            for (int k = 0; k < 4; k++) a[k] = (__m512bh)_mm512_loadu_si512(key[k] + i);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                __m512bh b = (__m512bh)_mm512_loadu_si512(query + g * n + i);
#pragma GCC unroll 8
                for (int k = 0; k < 4; k++)
                    acc[g][k] = (Floats)_mm512_dpbf16_ps((__m512)acc[g][k], a[k], b);
            }
        }
#else
        for (; i + LANES <= n; i += LANES) {
            Floats a[4];
#pragma GCC unroll 8
            for (int k = 0; k < 4; k++) a[k] = load(key[k] + i);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++) {
                Floats b = load(q + g * n + i);
#pragma GCC unroll 8
                for (int k = 0; k < 4; k++) acc[g][k] += a[k] * b;
            }
        }
#endif
#pragma GCC unroll 8
        for (int g = 0; g < G; g++) {
            float total[4];
            sums(acc[g][0], acc[g][1], acc[g][2], acc[g][3], total);
            for (int k = 0; k < 4; k++) {
                for (int64_t d = i; d < n; d++) total[k] += q[g * n + d] * wide(key[k][d]);
                score[g][j + k] = total[k] * scale;
            }
        }
    }
}

// Scores [CHUNK] to exponentials, in place. Returns the largest score; total: their sum.
static inline float exponentials(float *score, int64_t count, float *total) {
    for (int64_t j = count; j % LANES; j++) score[j] = -INFINITY;
    Floats most = load(score);
    for (int64_t j = LANES; j < count; j += LANES) {
        Floats x = load(score + j);
        most = (x > most) ? x : most;
    }
    float largest = most[0];
    for (int i = 1; i < LANES; i++) largest = most[i] > largest ? most[i] : largest;
    Floats parts = {};
    for (int64_t j = 0; j < count; j += LANES) {
        Floats p = exponential(load(score + j) - largest);
        for (int64_t k = count - j; k < LANES; k++) p[k] = 0.0f;
        parts += p;
        memcpy(score + j, &p, sizeof p);
    }
    *total = sum(parts);
    return largest;
}

// For G query heads, the sums of some values [head_dim], each times its weight.
template <int G>
static inline void weighted(float (*weight)[CHUNK], int64_t n, const Cached *const *values,
                            int64_t count, float *out, int64_t stride) {
    const int WIDE = 4;  // vectors of a value that are added together
    int64_t i = 0;
    for (; i + WIDE * LANES <= n; i += WIDE * LANES) {
        Floats acc[G][WIDE] = {};
        for (int64_t j = 0; j < count; j++) {
            Floats value[WIDE];
#pragma GCC unroll 8
            for (int v = 0; v < WIDE; v++) value[v] = load(values[j] + i + v * LANES);
#pragma GCC unroll 8
            for (int g = 0; g < G; g++)
#pragma GCC unroll 8
                for (int v = 0; v < WIDE; v++) acc[g][v] += weight[g][j] * value[v];
        }
        for (int g = 0; g < G; g++) memcpy(out + g * stride + i, acc[g], sizeof acc[g]);
    }
    for (; i < n; i++)
        for (int g = 0; g < G; g++) {
            float acc = 0.0f;
            for (int64_t j = 0; j < count; j++) acc += weight[g][j] * wide(values[j][i]);
            out[g * stride + i] = acc;
        }
}

// Some keys for G query heads, q [G, head_dim]. For each, out [G, 2 + head_dim] has the largest
// score, the sum of the exponentials, and the sum of the values, each times its exponential.
template <int G>
static void attend(const float *q, int64_t n, const Cached *const *keys,
                   const Cached *const *values, int64_t count, int64_t fetch, float *out) {
    float score[G][CHUNK];
    scores<G>(q, n, keys, values, count, fetch, score);
    for (int g = 0; g < G; g++)
        out[g * (2 + n)] = exponentials(score[g], count, out + g * (2 + n) + 1);
    weighted<G>(score, n, values, count, out + 2, 2 + n);
}

// As attend, for all query heads of a KV head, and the keys of a sequence from start to stop.
// fetch: how many elements of a row of the cache are fetched on the way: those of all KV heads for
// the first, since memory is read fastest in order, and none for the others.
static void attend_to(const float *q, int64_t group, int64_t n, const Cached *keys,
                      const Cached *values, int64_t row, const int32_t *pages, int64_t page_size,
                      int64_t start, int64_t stop, int64_t fetch, float *out) {
    const Cached *key[CHUNK], *value[CHUNK];
    int64_t page = start / page_size, in_page = start % page_size;
    for (int64_t j = 0; j < stop - start; j++) {
        int64_t slot = pages[page] * page_size + in_page;
        key[j] = keys + slot * row;
        value[j] = values + slot * row;
        if (++in_page == page_size) in_page = 0, page++;
    }
    auto heads = {attend<1>, attend<2>, attend<3>, attend<GROUP>};
    for (int64_t g = 0; g < group; g += GROUP) {
        int64_t together = group - g < GROUP ? group - g : GROUP;
        heads.begin()[together - 1](q + g * n, n, key, value, stop - start, g ? 0 : fetch,
                                     out + g * (2 + n));
    }
}

// ---- The step.

struct Span { int64_t sequence, start, stop; };  // the keys that a token sees

static Span seen(const Step &s, int64_t token, int64_t window) {
    int64_t b = 0;
    while (s.query_starts[b + 1] <= token) b++;
    int64_t stop = s.lengths[b] - (s.query_starts[b + 1] - token) + 1;
    int64_t start = window && stop > window ? stop - window : 0;
    return {b, start, stop};
}

static int64_t chunks_of(const Step &s) {
    int64_t most = 1;
    for (int64_t b = 0; b < s.sequences; b++)
        if (s.lengths[b] > most) most = s.lengths[b];
    return (most + CHUNK - 1) / CHUNK;
}

template <class T> static T *take(char *&at, int64_t count) {
    T *taken = (T *)at;
    at += (count * (int64_t)sizeof(T) + 63) / 64 * 64;
    return taken;
}

static Operands operands(char *&at, int64_t count) {
    Operands x;
    x.values = take<Operand>(at, count);
#if NARROW
    x.narrow = take<bfloat16>(at, count);
#endif
    return x;
}

struct Buffers {
    Operands normed, attended, active;
    float *qkv, *rotated, *partial, *cos, *sin, *gate, *up;
    int64_t chunks;
};

static Buffers buffers(const Model &m, const Step &s, char *&at) {
    int64_t t = s.tokens, chunks = chunks_of(s), head = m.head_dim;
    Buffers b;
    b.chunks = chunks;
    b.normed = operands(at, t * m.hidden);
    b.attended = operands(at, t * m.heads * head);
    b.active = operands(at, t * m.inner);
    b.qkv = take<float>(at, t * (m.heads + 2 * m.kv_heads) * head);
    b.rotated = take<float>(at, t * m.heads * head);
    b.partial = take<float>(at, t * m.heads * chunks * (2 + head));
    b.cos = take<float>(at, t * head / 2);
    b.sin = take<float>(at, t * head / 2);
    b.gate = take<float>(at, t * m.inner);
    b.up = take<float>(at, t * m.inner);
    return b;
}

// Where the threads of a step wait for each other. OpenMP's own barrier sleeps at once when a
// process has more OpenMP threads than CPUs, as with two models, and waking up takes as long as a
// product.
struct Meeting {
    std::atomic<int64_t> arrived{0}, turn{0};

    void wait(int64_t parts) {
        int64_t before = turn.load(std::memory_order_relaxed);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == parts) {
            arrived.store(0, std::memory_order_relaxed);
            turn.store(before + 1, std::memory_order_release);
            return;
        }
        for (int64_t spins = 0; turn.load(std::memory_order_acquire) == before; spins++) {
            if (spins > 20000) sched_yield();  // another process has a CPU
#if defined(__x86_64__)
            _mm_pause();
#endif
        }
    }
};

static void run_layer(const Model &m, const Layer &layer, const Step &s, const Buffers &b,
                      Weight *hidden, int64_t part, int64_t parts, Meeting &meeting) {
    const int64_t tokens = s.tokens, head = m.head_dim, group = m.heads / m.kv_heads;
    const int64_t q_rows = m.heads * head, kv_rows = m.kv_heads * head;
    const int64_t qkv_rows = q_rows + 2 * kv_rows;

    Range r = share(tokens, parts, part);
    for (int64_t t = r.start; t < r.stop; t++)
        norm(hidden, t, layer.attn_norm, m.hidden, m.eps, b.normed);
    meeting.wait(parts);
    const Matrix *projections[] = {&layer.q, &layer.k, &layer.v};
    int64_t units = 0, first_unit = 0, first_row = 0;
    for (const Matrix *matrix : projections) units += units_of(*matrix);
    r = share(units, parts, part);
    for (const Matrix *matrix : projections) {
        int64_t start = r.start > first_unit ? r.start - first_unit : 0;
        int64_t own = units_of(*matrix);
        int64_t stop = r.stop - first_unit < own ? r.stop - first_unit : own;
        product(*matrix, start, stop, b.normed, tokens, [&](int64_t row, const float *values) {
            for (int64_t t = 0; t < tokens; t++) b.qkv[t * qkv_rows + first_row + row] = values[t];
        });
        first_unit += own;
        first_row += matrix->rows;
    }
    meeting.wait(parts);
    int64_t all_heads = m.heads + 2 * m.kv_heads;
    r = share(tokens * all_heads, parts, part);
    for (int64_t unit = r.start; unit < r.stop; unit++) {
        int64_t t = unit / all_heads, h = unit % all_heads;
        float *x = b.qkv + t * qkv_rows + h * head;
        const float *cos = b.cos + t * head / 2, *sin = b.sin + t * head / 2;
        if (h < m.heads) {
            rotate_head(x, layer.q_norm, cos, sin, head, m.eps, b.rotated + t * q_rows + h * head);
            continue;
        }
        bool key = h < m.heads + m.kv_heads;
        int64_t at = s.slots[t] * kv_rows + (h - m.heads - (key ? 0 : m.kv_heads)) * head;
        float turned[head];
        if (key) rotate_head(x, layer.k_norm, cos, sin, head, m.eps, turned);
        for (int64_t i = 0; i < head; i++)
            put((key ? layer.keys : layer.values) + at + i, key ? turned[i] : x[i]);
    }
    meeting.wait(parts);
    const int64_t entry = 2 + head;
    r = share(b.chunks * tokens * m.kv_heads, parts, part);
    for (int64_t unit = r.start; unit < r.stop; unit++) {
        int64_t h = unit % m.kv_heads, t = unit / m.kv_heads % tokens;
        int64_t c = unit / (tokens * m.kv_heads);
        Span span = seen(s, t, layer.window);
        int64_t start = span.start + c * CHUNK;
        int64_t stop = start + CHUNK < span.stop ? start + CHUNK : span.stop;
        if (start >= stop) continue;
        attend_to(b.rotated + t * q_rows + h * group * head, group, head, layer.keys + h * head,
                  layer.values + h * head, kv_rows,
                  s.block_table + span.sequence * s.max_pages, m.page_size, start, stop,
                  h ? 0 : kv_rows, b.partial + ((c * tokens + t) * m.heads + h * group) * entry);
    }
    meeting.wait(parts);
    r = share(tokens * m.heads, parts, part);
    for (int64_t unit = r.start; unit < r.stop; unit++) {
        int64_t t = unit / m.heads;
        Span span = seen(s, t, layer.window);
        int64_t chunks = (span.stop - span.start + CHUNK - 1) / CHUNK;
        const float *partial = b.partial + unit * entry;
        const int64_t stride = tokens * m.heads * entry;
        float most = partial[0], total = 0.0f, weight[chunks];
        for (int64_t c = 1; c < chunks; c++)
            if (partial[c * stride] > most) most = partial[c * stride];
        for (int64_t c = 0; c < chunks; c++) {
            weight[c] = exponential(partial[c * stride] - most);
            total += weight[c] * partial[c * stride + 1];
        }
        for (int64_t i = 0; i < head; i++) {
            float value = 0.0f;
            for (int64_t c = 0; c < chunks; c++) value += weight[c] * partial[c * stride + 2 + i];
            b.attended.set(unit * head + i, value / total);
        }
    }
    meeting.wait(parts);
    auto residual = [&](int64_t row, const float *values) {
        for (int64_t t = 0; t < tokens; t++) {
            Weight *at = hidden + t * m.hidden + row;
            put(at, wide(*at) + values[t]);
        }
    };
    r = share(units_of(layer.o), parts, part);
    product(layer.o, r.start, r.stop, b.attended, tokens, residual);
    meeting.wait(parts);
    r = share(tokens, parts, part);
    for (int64_t t = r.start; t < r.stop; t++)
        norm(hidden, t, layer.mlp_norm, m.hidden, m.eps, b.normed);
    meeting.wait(parts);
    r = share(units_of(layer.gate), parts, part);
    auto into = [&](float *out) {
        return [=](int64_t row, const float *values) {
            for (int64_t t = 0; t < tokens; t++) out[t * m.inner + row] = values[t];
        };
    };
    product(layer.gate, r.start, r.stop, b.normed, tokens, into(b.gate));
    product(layer.up, r.start, r.stop, b.normed, tokens, into(b.up));
    int64_t own_rows = r.stop * layer.gate.tile;
    own_rows = (own_rows < m.inner ? own_rows : m.inner) - r.start * layer.gate.tile;
    for (int64_t t = 0; t < tokens; t++) {
        int64_t first = t * m.inner + r.start * layer.gate.tile;
        activate(b.gate, b.up, first, first + own_rows, b.active);
    }
    meeting.wait(parts);
    r = share(units_of(layer.down), parts, part);
    product(layer.down, r.start, r.stop, b.active, tokens, residual);
    meeting.wait(parts);
}

extern "C" {

// The most tokens for which this is faster than oneDNN, as measured on a CPU with AVX-512.
int64_t max_tokens() {
#if DIRECT
    return MAX_TOKENS;
#else
    return 32;
#endif
}

int64_t scratch_bytes(const Model *model, const Step *step) {
    char *at = 0;
    buffers(*model, *step, at);
    return at - (char *)0;
}

// Runs layers in turn on hidden [tokens, hidden], in place.
void run_layers(const Model *model, const Layer *layers, int64_t count, const Step *step,
                Weight *hidden, char *scratch) {
    Buffers b = buffers(*model, *step, scratch);
    for (int64_t i = 0; i < step->tokens * model->head_dim / 2; i++) {
        b.cos[i] = cosf(step->angles[i]) * step->scale;
        b.sin[i] = sinf(step->angles[i]) * step->scale;
    }
    Meeting meeting;
#pragma omp parallel num_threads(model->threads)
    for (int64_t i = 0; i < count; i++)
        run_layer(*model, layers[i], *step, b, hidden, omp_get_thread_num(), omp_get_num_threads(),
                  meeting);
}

// The final norm and the head: hidden [tokens, hidden] to logits [tokens, head->rows].
void run_head(const Model *model, const Weight *final_norm, const Matrix *head, int64_t tokens,
              const Weight *hidden, float *logits) {
    char *size = 0;
    operands(size, tokens * model->hidden);
    std::unique_ptr<char[]> scratch(new char[size - (char *)0]);
    char *at = scratch.get();
    Operands normed = operands(at, tokens * model->hidden);
    for (int64_t t = 0; t < tokens; t++)
        norm(hidden, t, final_norm, model->hidden, model->eps, normed);
#pragma omp parallel num_threads(model->threads)
    {
        Range r = share(units_of(*head), omp_get_num_threads(), omp_get_thread_num());
        product(*head, r.start, r.stop, normed, tokens, [&](int64_t row, const float *values) {
            for (int64_t t = 0; t < tokens; t++) logits[t * head->rows + row] = values[t];
        });
    }
}
}
