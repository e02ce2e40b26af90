// Noise, and data with noise, on a CPU: the twin of noising.py.

#include "philox.h"

using namespace fastcm;

struct NoiseArguments {
  int64_t B, D, threads;
  Tensor key;
  int64_t stream, first;
  Tensor out;
};

// out = z
extern "C" int noise(const NoiseArguments* p) {
  FASTCM_CHECK(check_key(p->key));
  FASTCM_CHECK(p->out.check(p->B * p->D));
  const Noise noise(p->key, p->stream, p->first);
  for_pieces(p->B, p->D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float z[PIECE];
    noise.normals(sample, begin, n, z);
    store(p->out, sample * p->D + begin, n, z);
  });
  return OK;
}

struct NoisingArguments {
  int64_t B, D, threads;
  State state;  // alpha and sigma: [K, B]
  Tensor out[2];
};

// out[k] = alpha[k] x0 + sigma[k] z; the second only if it is there
extern "C" int noising(const NoisingArguments* p) {
  const State& s = p->state;
  const int64_t B = p->B, D = p->D, K = p->out[1] ? 2 : 1;
  FASTCM_CHECK(s.x.check(B * D, true));
  FASTCM_CHECK(s.alpha.check_rows(K * B));
  FASTCM_CHECK(s.sigma.check_rows(K * B));
  FASTCM_CHECK(check_key(s.key));
  for (int64_t k = 0; k < K; ++k) FASTCM_CHECK(p->out[k].check(B * D));
  const Noise noise = s.noise();
  for_pieces(B, D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float z[PIECE], converted[PIECE], piece[PIECE];
    const int64_t at = sample * D + begin;
    noise.normals(sample, begin, n, z);
    const float* x0 = load(s.x, at, n, converted);
    for (int64_t k = 0; k < K; ++k) {
      const float alpha = s.alpha.at(k * B + sample), sigma = s.sigma.at(k * B + sample);
      float* __restrict out = room(p->out[k], at, n, piece);
      for (int64_t i = 0; i < padded(n); ++i) out[i] = alpha * x0[i] + sigma * z[i];
      store(p->out[k], at, n, out);
    }
  });
  return OK;
}
