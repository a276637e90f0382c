// fp32 SIMD built on GCC/Clang vector extensions, so that one source serves AVX-512, AVX2, SSE and NEON.
//
// Everything that decides the order of a sum lives here. A dot product is: one accumulator of LANES lanes walking K in
// order, then a fold by halves (lane i + lane i + LANES/2, and so on). It does not matter how many other dot products
// are computed beside it, which is what makes a row's result independent of the batch it runs in.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace llmopt {

#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;
#endif

typedef float Vec __attribute__((vector_size(LANES * 4)));
typedef int32_t IVec __attribute__((vector_size(LANES * 4)));
typedef uint16_t HalfBits __attribute__((vector_size(LANES * 2)));
typedef uint32_t WideBits __attribute__((vector_size(LANES * 4)));

#define LLMOPT_INLINE inline __attribute__((always_inline))

LLMOPT_INLINE Vec splat(float x) {
  return x - Vec{};
}

// a * b + c rounded once where the CPU can: written out, since a compiler that contracts at its own choice gives the same
// sum other bits in another loop.
LLMOPT_INLINE Vec fma(Vec a, Vec b, Vec c) {
#if defined(__AVX512F__)
  return (Vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX__) && defined(__FMA__)
  return (Vec)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (Vec)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

LLMOPT_INLINE Vec load(const float* p) {
  Vec v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

LLMOPT_INLINE Vec load(const c10::BFloat16* p) {
  HalfBits bits;
  std::memcpy(&bits, p, sizeof bits);
  WideBits wide = __builtin_convertvector(bits, WideBits) << 16;
  Vec v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

LLMOPT_INLINE Vec load(const c10::Half* p) {
#if defined(__AVX512F__)
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__AVX__) && defined(__F16C__)
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  Vec v;
  for (int i = 0; i < LANES; ++i) v[i] = static_cast<float>(p[i]);
  return v;
#endif
}

LLMOPT_INLINE void store(float* p, Vec v) {
  std::memcpy(p, &v, sizeof v);
}

// The first `count` < LANES elements, zero beyond.
template <typename T>
LLMOPT_INLINE Vec load_part(const T* p, int count) {
  T buffer[LANES] = {};
  std::memcpy(buffer, p, count * sizeof(T));
  return load(buffer);
}

// `count` elements of p as fp32.
template <typename T>
inline void widen(float* out, const T* p, int64_t count) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(out + i, load(p + i));
  for (; i < count; ++i) out[i] = static_cast<float>(p[i]);
}

#if defined(__clang__) || __GNUC__ >= 12
#define LLMOPT_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define LLMOPT_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, IVec{__VA_ARGS__})
#endif

// Folds the blocks of B lanes of a, then of b, to B/2 lanes each: lane o of a folded block = lane o + lane o + B/2.
template <int B, int... P>
LLMOPT_INLINE Vec fold(Vec a, Vec b, std::integer_sequence<int, P...>) {
  constexpr int H = B / 2;
  Vec low = LLMOPT_SHUFFLE(a, b, (P / H * B + P % H)...);
  Vec high = LLMOPT_SHUFFLE(a, b, (P / H * B + P % H + H)...);
  return low + high;
}

template <int B, int COUNT>
LLMOPT_INLINE void fold_all(Vec* v) {
  if constexpr (B > 1) {
    constexpr int HALF = (COUNT + 1) / 2;
#pragma GCC unroll 16
    for (int i = 0; i < HALF; ++i) {
      v[i] = fold<B>(v[2 * i], v[2 * i + 1 < COUNT ? 2 * i + 1 : 2 * i],
                     std::make_integer_sequence<int, LANES>{});
    }
    fold_all<B / 2, HALF>(v);
  }
}

// sums[i] = the lanes of v[i] summed by halves; v is overwritten.
template <int COUNT>
LLMOPT_INLINE void lane_sums(Vec* v, float* sums) {
  if constexpr (COUNT > LANES) {
    lane_sums<LANES>(v, sums);
    lane_sums<COUNT - LANES>(v + LANES, sums + LANES);
  } else {
    fold_all<LANES, COUNT>(v);
    float out[LANES];
    store(out, v[0]);
    for (int i = 0; i < COUNT; ++i) sums[i] = out[i];
  }
}

// Stops the compiler from folding a shared load into every multiply that uses it.
#if defined(__AVX512F__)
#define LLMOPT_KEEP(v) __asm__("" : "+v"(v))
#elif defined(__x86_64__)
#define LLMOPT_KEEP(v) __asm__("" : "+x"(v))
#elif defined(__aarch64__)
#define LLMOPT_KEEP(v) __asm__("" : "+w"(v))
#else
#define LLMOPT_KEEP(v)
#endif

// sums[r * M + m] = dot(rows[r], xs + m * stride) over K, for R rows of any float type and M rows of fp32.
template <int R, int M, typename T>
LLMOPT_INLINE void dots(const T* const* rows, const float* xs, int64_t stride, int64_t K, float* sums) {
  Vec acc[R * M] = {};
  int64_t k = 0;
  for (; k + LANES <= K; k += LANES) {
    Vec w[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      // the next R rows, into L2 only: on Zen 4 this doubled the speed at 4 and 8 rows of x, into L1 it did nothing
      __builtin_prefetch(rows[r] + R * K + k, 0, 2);
      w[r] = load(rows[r] + k);
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec x = load(xs + m * stride + k);
      LLMOPT_KEEP(x);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * M + m] = fma(w[r], x, acc[r * M + m]);
    }
  }
  if (k < K) {
    int rest = static_cast<int>(K - k);
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) {
      Vec x = load_part(xs + m * stride + k, rest);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) acc[r * M + m] = fma(load_part(rows[r] + k, rest), x, acc[r * M + m]);
    }
  }
  lane_sums<R * M>(acc, sums);
}

// How many x rows one pass over a weight row serves, and how many weight rows go side by side: registers decide.
constexpr int MAX_TILE = LANES == 16 ? 8 : 4;
constexpr int tile_rows(int m) {
  constexpr int budget = LANES == 16 ? 24 : 12;
  return m * 4 <= budget ? 4 : budget / m;
}

LLMOPT_INLINE Vec select(IVec mask, Vec yes, Vec no) {
  return (Vec)((mask & (IVec)yes) | (~mask & (IVec)no));
}

// e^x to about 1.5 ulp for x <= 88; 0 below -87.3.
LLMOPT_INLINE Vec exp_of(Vec x) {
  IVec tiny = x < splat(-87.3f);
  x = select(tiny, splat(-87.3f), x);
  x = select(x > splat(88.0f), splat(88.0f), x);
  const Vec round = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  Vec n = (x * 1.44269504088896341f + round) - round;
  Vec r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  Vec p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p, r * r, r) + 1.0f;
  IVec power = (__builtin_convertvector(n, IVec) + 127) << 23;
  return select(tiny, Vec{}, p * (Vec)power);
}

LLMOPT_INLINE Vec tanh_of(Vec x) {
  Vec size = select(x < Vec{}, -x, x);
  size = select(size > splat(40.0f), splat(40.0f), size);
  Vec z = x * x;
  Vec p = splat(-5.70498872745e-3f);  // Cephes tanhf, |x| < 0.625
  p = fma(p, z, splat(2.06390887954e-2f));
  p = fma(p, z, splat(-5.37397155531e-2f));
  p = fma(p, z, splat(1.33314422036e-1f));
  p = fma(p, z, splat(-3.33332819422e-1f));
  Vec small = fma(p * z, x, x);
  Vec large = 1.0f - 2.0f / (exp_of(size + size) + 1.0f);
  large = select(x < Vec{}, -large, large);
  return select(size < splat(0.625f), small, large);
}

}  // namespace llmopt
