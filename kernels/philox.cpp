// Philox4x32-10 on a CPU: what the normals of each block of four elements are made of, uniforms in
// (0, 1) for two radii and two angles.
//
// The counters and the conversion are those of fastcm/rng.py, so every bit is: the product is exact,
// there is one rounding in the sum.

#include <algorithm>
#include <cstdint>

namespace {

constexpr int64_t CHUNK = 512;

inline void round(uint32_t* c, uint32_t k0, uint32_t k1) {
  const uint64_t p0 = uint64_t(0xD2511F53) * c[0], p1 = uint64_t(0xCD9E8D57) * c[2];
  const uint32_t c1 = c[1], c3 = c[3];
  c[0] = uint32_t(p1 >> 32) ^ c1 ^ k0;
  c[1] = uint32_t(p1);
  c[2] = uint32_t(p0 >> 32) ^ c3 ^ k1;
  c[3] = uint32_t(p0);
}

}  // namespace

// out: [2, samples, quads, 2]; key: seed, step, first sample.
extern "C" void uniforms(float* out, int64_t samples, int64_t quads, const int64_t* key,
                         int64_t first, int64_t stream, int threads) {
  const uint32_t k0 = uint32_t(key[0]), k1 = uint32_t(key[0] >> 32);
  const uint32_t step = uint32_t(key[1]);
  const uint32_t c3 = uint32_t(key[1] >> 32 & 0xFFFFFF) | uint32_t(stream) << 24;
  const int64_t chunks = (quads + CHUNK - 1) / CHUNK, plane = 2 * samples * quads;
#pragma omp parallel for schedule(static) num_threads(threads) if (plane >= 8192)
  for (int64_t i = 0; i < samples * chunks; ++i) {
    const int64_t sample = i / chunks, begin = i % chunks * CHUNK;
    const int64_t end = std::min(begin + CHUNK, quads);
    const uint32_t index = uint32_t(key[2] + first + sample);
    float* __restrict row = out + 2 * sample * quads;
#pragma omp simd
    for (int64_t q = begin; q < end; ++q) {
      uint32_t c[4] = {uint32_t(q), index, step, c3}, a = k0, b = k1;
      for (int r = 0; r < 10; ++r) {
        round(c, a, b);
        a += 0x9E3779B9;
        b += 0xBB67AE85;
      }
      for (int k = 0; k < 4; ++k)
        row[k % 2 * plane + 2 * q + k / 2] = float(c[k]) * 0x1p-32f + 0x1p-33f;
    }
  }
}
