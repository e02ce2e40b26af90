// Operands of the pointwise kernels on a CPU: tensors of several dtypes, read and written in pieces
// of a sample that fit the first-level cache.
//
// Arithmetic is float32. A piece is a whole number of vectors: its last one is filled up with
// zeros, so every element takes the same instructions wherever it stands, and its bits do not depend
// on how the work is divided.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace fastcm {

enum Dtype : int64_t { NONE, F32, BF16, F16, U8, F64, I64 };
enum Error { OK, WRONG_DTYPE, WRONG_SIZE, NO_MEMORY, NO_CLOSED_FORM };

// As fastcm/ops/native.py packs it; contiguous, on the CPU.
struct Tensor {
  void* data;
  int64_t dtype;
  int64_t numel;

  explicit operator bool() const { return dtype != NONE; }

  // Whether it has that many elements of a dtype that may be read (or written) as floats.
  Error check(int64_t count, bool pixels = false) const {
    if (dtype != F32 && dtype != BF16 && dtype != F16 && !(pixels && dtype == U8)) return WRONG_DTYPE;
    return check_size(count);
  }
  Error check_rows(int64_t count) const {
    if (dtype != F32 && dtype != F64) return WRONG_DTYPE;
    return check_size(count);
  }
  Error check_size(int64_t count) const {
    if (numel != count) return WRONG_SIZE;
    return data || !count ? OK : NO_MEMORY;
  }
  // A coefficient: computed in float64, applied in float32.
  float at(int64_t i) const {
    return dtype == F64 ? float(static_cast<const double*>(data)[i])
                        : static_cast<const float*>(data)[i];
  }
};

constexpr int64_t PIECE = 1024;
constexpr int64_t VECTOR = 16;

inline int64_t padded(int64_t n) { return (n + VECTOR - 1) / VECTOR * VECTOR; }

inline uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}

inline float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}

inline float from_bf16(uint16_t h) { return float_of(uint32_t(h) << 16); }

// To the nearest, ties to even; NaN stays NaN.
inline uint16_t to_bf16(float x) {
  const uint32_t b = bits_of(x);
  const uint32_t rounded = (b + 0x7FFF + (b >> 16 & 1)) >> 16;
  return uint16_t((b & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

inline float from_f16(uint16_t h) {
  const uint32_t magnitude = uint32_t(h & 0x7FFF) << 13;
  // 2^112 moves the exponent's bias, and makes normal numbers of denormal ones
  const float finite = float_of(magnitude) * 0x1p112f;
  const uint32_t b = magnitude >= 0x0F800000 ? magnitude | 0x7F800000 : bits_of(finite);
  return float_of(b | uint32_t(h & 0x8000) << 16);
}

inline uint16_t to_f16(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, b = bits_of(x) & 0x7FFFFFFF;
  const uint32_t normal = (b - 0x38000000 + 0xFFF + (b >> 13 & 1)) >> 13;
  // below 2^-14 the sum with 1/2 rounds to the grid of denormal numbers
  const uint32_t denormal = bits_of(float_of(b) + 0.5f) - 0x3F000000;
  const uint32_t finite = b < 0x38800000 ? denormal : std::min(normal, uint32_t(0x7C00));
  return uint16_t(sign | (b > 0x7F800000 ? 0x7E00 : finite));
}

// Elements begin .. begin + n of a tensor as floats: in place, or converted to `piece`.
inline const float* load(const Tensor& t, int64_t begin, int64_t n, float* __restrict piece) {
  if (t.dtype == F32) {
    const float* x = static_cast<const float*>(t.data) + begin;
    if (n % VECTOR == 0) return x;
    std::copy(x, x + n, piece);
  } else if (t.dtype == U8) {
    const uint8_t* x = static_cast<const uint8_t*>(t.data) + begin;
    for (int64_t i = 0; i < n; ++i) piece[i] = float(x[i]) / 127.5f - 1.0f;
  } else if (t.dtype == BF16) {
    const uint16_t* x = static_cast<const uint16_t*>(t.data) + begin;
    for (int64_t i = 0; i < n; ++i) piece[i] = from_bf16(x[i]);
  } else {
    const uint16_t* x = static_cast<const uint16_t*>(t.data) + begin;
    for (int64_t i = 0; i < n; ++i) piece[i] = from_f16(x[i]);
  }
  std::fill(piece + n, piece + padded(n), 0.0f);
  return piece;
}

// Where floats for elements begin .. begin + n are written: in place, or in `piece` until `store`.
inline float* room(const Tensor& t, int64_t begin, int64_t n, float* piece) {
  return t.dtype == F32 && n % VECTOR == 0 ? static_cast<float*>(t.data) + begin : piece;
}

inline void store(const Tensor& t, int64_t begin, int64_t n, const float* __restrict piece) {
  if (t.dtype == F32) {
    float* out = static_cast<float*>(t.data) + begin;
    if (out != piece) std::copy(piece, piece + n, out);
  } else if (t.dtype == BF16) {
    uint16_t* __restrict out = static_cast<uint16_t*>(t.data) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = to_bf16(piece[i]);
  } else {
    uint16_t* __restrict out = static_cast<uint16_t*>(t.data) + begin;
    for (int64_t i = 0; i < n; ++i) out[i] = to_f16(piece[i]);
  }
}

constexpr int64_t ALONE = 32768;  // elements that one thread does sooner than two can be woken

// body(sample, begin in the sample, elements) for every piece of B samples of D elements.
template <class Body>
void for_pieces(int64_t B, int64_t D, int64_t threads, Body body) {
  const int64_t pieces = (D + PIECE - 1) / PIECE;
  const auto work = [&](int64_t i) {
    const int64_t begin = i % pieces * PIECE;
    body(i / pieces, begin, std::min(PIECE, D - begin));
  };
  if (threads == 1 || B * D < ALONE) {
    for (int64_t i = 0; i < B * pieces; ++i) work(i);
    return;
  }
#pragma omp parallel for schedule(static) num_threads(int(threads))
  for (int64_t i = 0; i < B * pieces; ++i) work(i);
}

#define FASTCM_CHECK(condition)                        \
  if (const fastcm::Error error = (condition); error) \
  return error

}  // namespace fastcm
