// Standard normals from counters on a CPU: Philox4x32-10 (Salmon et al. 2011) and Box-Muller.
//
// Counters, uniforms and their order are those of fastcm/rng.py, so every word is; the normals are
// within 5e-6 of those in float64. Polynomials of logarithm, sine and cosine: Cephes (Moshier 1989).

#pragma once

#include <cmath>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "operands.h"

namespace fastcm {

// The words of LANES neighbouring blocks, in 64-bit lanes whose upper halves nobody looks at: then a
// product of 32-bit words is one instruction, which compilers do not find by themselves.
#if defined(__AVX512F__)
using Words = __m512i;
constexpr int LANES = 8;
inline Words all(uint64_t w) { return _mm512_set1_epi64(int64_t(w)); }
inline Words count(uint64_t w) {
  return _mm512_add_epi64(all(w), _mm512_setr_epi64(0, 1, 2, 3, 4, 5, 6, 7));
}
inline Words product(Words a, Words b) { return _mm512_mul_epu32(a, b); }
inline Words high(Words p) { return _mm512_srli_epi64(p, 32); }
inline Words mixed(Words a, Words b, Words c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
inline void put(Words w, uint32_t* out) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm512_cvtepi64_epi32(w));
}
#elif defined(__AVX2__)
using Words = __m256i;
constexpr int LANES = 4;
inline Words all(uint64_t w) { return _mm256_set1_epi64x(int64_t(w)); }
inline Words count(uint64_t w) { return _mm256_add_epi64(all(w), _mm256_setr_epi64x(0, 1, 2, 3)); }
inline Words product(Words a, Words b) { return _mm256_mul_epu32(a, b); }
inline Words high(Words p) { return _mm256_srli_epi64(p, 32); }
inline Words mixed(Words a, Words b, Words c) {
  return _mm256_xor_si256(_mm256_xor_si256(a, b), c);
}
inline void put(Words w, uint32_t* out) {
  const __m256i even = _mm256_setr_epi32(0, 2, 4, 6, 0, 2, 4, 6);
  const __m256i packed = _mm256_permutevar8x32_epi32(w, even);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_castsi256_si128(packed));
}
#else
using Words = uint64_t;
constexpr int LANES = 1;
inline Words all(uint64_t w) { return w; }
inline Words count(uint64_t w) { return w; }
inline Words product(Words a, Words b) { return uint64_t(uint32_t(a)) * uint32_t(b); }
inline Words high(Words p) { return p >> 32; }
inline Words mixed(Words a, Words b, Words c) { return a ^ b ^ c; }
inline void put(Words w, uint32_t* out) { *out = uint32_t(w); }
#endif

// sqrt(-2 log u) for u in [2^-33, 1]
inline float radius(float u) {
  const int32_t shifted = int32_t(bits_of(u)) - 0x3F3504F3;  // of sqrt(1/2)
  const int32_t e = shifted >> 23;
  const float f = float_of(bits_of(u) - (uint32_t(e) << 23)) - 1.0f, n = float(e);
  float p = 7.0376836292e-2f;
  p = p * f - 1.1514610310e-1f;
  p = p * f + 1.1676998740e-1f;
  p = p * f - 1.2420140846e-1f;
  p = p * f + 1.4249322787e-1f;
  p = p * f - 1.6668057665e-1f;
  p = p * f + 2.0000714765e-1f;
  p = p * f - 2.4999993993e-1f;
  p = p * f + 3.3333331174e-1f;
  const float square = f * f;
  float log = p * f * square - 2.12194440e-4f * n - 0.5f * square;
  log = (f + log) + 0.693359375f * n;
  return std::sqrt(std::max(-2.0f * log, 0.0f));
}

// r cos(2 pi v), r sin(2 pi v) for v in (0, 1]
inline void turn(float v, float r, float& c, float& s) {
  const int32_t quarter = int32_t(4.0f * v + 0.5f);
  const float x = (4.0f * v - float(quarter)) * 1.57079632679f, z = x * x;
  const float sine = x + x * z * (-1.6666654611e-1f + z * (8.3321608736e-3f - z * 1.9515295891e-4f));
  const float cosine = 1.0f - 0.5f * z +
      z * z * (4.166664568298827e-2f + z * (-1.388731625493765e-3f + z * 2.443315711809948e-5f));
  const bool odd = quarter & 1;
  const uint32_t minus_c = uint32_t((quarter + 1) & 2) << 30, minus_s = uint32_t(quarter & 2) << 30;
  c = r * float_of(bits_of(odd ? sine : cosine) ^ minus_c);
  s = r * float_of(bits_of(odd ? cosine : sine) ^ minus_s);
}

// The noise of one step in one stream; made from a NoiseKey's seed, step, first sample.
struct Noise {
  uint32_t k0, k1, step, c3, first;

  Noise(const Tensor& key, int64_t stream, int64_t first_sample) {
    const int64_t* k = static_cast<const int64_t*>(key.data);
    k0 = uint32_t(k[0]), k1 = uint32_t(k[0] >> 32);
    step = uint32_t(k[1]);
    c3 = uint32_t(k[1] >> 32 & 0xFFFFFF) | uint32_t(stream) << 24;
    first = uint32_t(k[2] + first_sample);
  }

  // The four words of LANES blocks.
  struct Block {
    Words w[4];
  };
  Block block(Words w0, Words w1) const {
    Words w2 = all(step), w3 = all(c3);
    const Words m0 = all(0xD2511F53), m1 = all(0xCD9E8D57);
    for (uint32_t r = 0; r < 10; ++r) {
      const Words p0 = product(w0, m0), p1 = product(w2, m1);
      w0 = mixed(high(p1), w1, all(k0 + r * 0x9E3779B9));
      w2 = mixed(high(p0), w3, all(k1 + r * 0xBB67AE85));
      w1 = p1;
      w3 = p0;
    }
    return {{w0, w1, w2, w3}};
  }

  // Normals of elements begin .. begin + n of a sample, begin a multiple of PIECE; z: PIECE floats.
  void normals(int64_t sample, int64_t begin, int64_t n, float* __restrict z) const {
    alignas(64) uint32_t words[4][PIECE / 4];
    alignas(64) float u[4][PIECE / 4];
    const uint32_t index = first + uint32_t(sample), q0 = uint32_t(begin / 4);
    const int quads = int((n + 4 * VECTOR - 1) / (4 * VECTOR) * VECTOR);
    for (int q = 0; q < quads; q += LANES) {
      const Block b = block(count(q0 + uint32_t(q)), all(index));
      for (int k = 0; k < 4; ++k) put(b.w[k], words[k] + q);
    }
    for (int k = 0; k < 4; k += 2) {
#pragma omp simd
      for (int q = 0; q < quads; ++q) {
        // exact product, one rounding in the sum
        const float v = float(words[k][q]) * 0x1p-32f + 0x1p-33f;
        const float angle = float(words[k + 1][q]) * 0x1p-32f + 0x1p-33f;
        turn(angle, radius(v), u[k][q], u[k + 1][q]);
      }
    }
#pragma omp simd
    for (int q = 0; q < quads; ++q)
      for (int k = 0; k < 4; ++k) z[4 * q + k] = u[k][q];
  }
};

inline Error check_key(const Tensor& key) {
  if (key.dtype != I64) return WRONG_DTYPE;
  return key.check_size(3);
}

// A tensor, or alpha x + sigma z in closed form where alpha is there; as fastcm/ops/native.py packs it.
struct State {
  Tensor x, alpha, sigma, key;
  int64_t stream, first;

  Error check(int64_t B, int64_t D) const {
    FASTCM_CHECK(x.check(B * D, bool(alpha)));
    if (!alpha) return OK;
    FASTCM_CHECK(alpha.check_rows(B));
    FASTCM_CHECK(sigma.check_rows(B));
    return check_key(key);
  }

  Noise noise() const { return Noise(key, stream, first); }

  // A piece of it; z: normals of this noise, or made there.
  const float* load(int64_t sample, int64_t D, int64_t begin, int64_t n, float* __restrict piece,
                    const float* z = nullptr) const {
    const int64_t at = sample * D + begin;
    if (!alpha) return fastcm::load(x, at, n, piece);
    alignas(64) float converted[PIECE], made[PIECE];
    if (!z) {
      noise().normals(sample, begin, n, made);
      z = made;
    }
    const float* __restrict x0 = fastcm::load(x, at, n, converted);
    const float a = alpha.at(sample), s = sigma.at(sample);
    for (int64_t i = 0; i < padded(n); ++i) piece[i] = a * x0[i] + s * z[i];
    return piece;
  }
};

}  // namespace fastcm
