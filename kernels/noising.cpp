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

struct NumberedNoiseArguments {
  int64_t B, D, threads;
  int64_t key[3];  // seed, step, first sample
  int64_t stream, first;
  Tensor out;
};

// As noise, of a key that nobody made a tensor of
extern "C" int numbered_noise(const NumberedNoiseArguments* p) {
  const Tensor key{const_cast<int64_t*>(p->key), I64, 3};
  const NoiseArguments arguments{p->B, p->D, p->threads, key, p->stream, p->first, p->out};
  return noise(&arguments);
}

// out = one number of (0, 1) for each sample, of the first word of its first block
extern "C" int uniform(const NoiseArguments* p) {
  FASTCM_CHECK(check_key(p->key));
  if (p->out.dtype != F64) return WRONG_DTYPE;
  if (p->out.numel != p->B) return WRONG_SIZE;
  const Noise noise(p->key, p->stream, p->first);
  double* out = static_cast<double*>(p->out.data);
  for (int64_t sample = 0; sample < p->B; sample += LANES) {
    uint32_t words[LANES];
    put(noise.block(all(0), count(noise.first + uint32_t(sample))).w[0], words);
    for (int64_t k = 0; k < std::min<int64_t>(LANES, p->B - sample); ++k)
      out[sample + k] = (double(words[k]) + 0.5) * 0x1p-32;
  }
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
