// The affine maps around the network on a CPU: the twin of affine.py.

#include "philox.h"

using namespace fastcm;

struct BoundaryArguments {
  int64_t B, D, threads;
  State x;
  Tensor F, a, b, out;
};

// out = a x + b F
extern "C" int boundary(const BoundaryArguments* p) {
  const int64_t B = p->B, D = p->D;
  FASTCM_CHECK(p->x.check(B, D));
  FASTCM_CHECK(p->F.check(B * D));
  FASTCM_CHECK(p->a.check_rows(B));
  FASTCM_CHECK(p->b.check_rows(B));
  FASTCM_CHECK(p->out.check(B * D));
  for_pieces(B, D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float x_piece[PIECE], F_piece[PIECE], piece[PIECE];
    const int64_t at = sample * D + begin;
    const float* __restrict x = p->x.load(sample, D, begin, n, x_piece);
    const float* __restrict F = load(p->F, at, n, F_piece);
    const float a = p->a.at(sample), b = p->b.at(sample);
    float* __restrict out = room(p->out, at, n, piece);
    for (int64_t i = 0; i < padded(n); ++i) out[i] = a * x[i] + b * F[i];
    store(p->out, at, n, out);
  });
  return OK;
}

struct ScaleArguments {
  int64_t B, D, threads;
  Tensor g, c, out;
};

// out = c g
extern "C" int scale(const ScaleArguments* p) {
  const int64_t B = p->B, D = p->D;
  FASTCM_CHECK(p->g.check(B * D));
  FASTCM_CHECK(p->c.check_rows(B));
  FASTCM_CHECK(p->out.check(B * D));
  for_pieces(B, D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float g_piece[PIECE], piece[PIECE];
    const int64_t at = sample * D + begin;
    const float* __restrict g = load(p->g, at, n, g_piece);
    const float c = p->c.at(sample);
    float* __restrict out = room(p->out, at, n, piece);
    for (int64_t i = 0; i < padded(n); ++i) out[i] = c * g[i];
    store(p->out, at, n, out);
  });
  return OK;
}

struct EulerArguments {
  int64_t B, D, threads;
  State x;
  Tensor v, dt, v_uncond, guidance, scale, input_scale;  // the last four may be absent
  Tensor out, input;                                      // and the second result
};

template <bool GUIDED, bool PAIR>
static void step(int64_t n, float scale, const float* __restrict x, float dt,
                 const float* __restrict v, float w, const float* __restrict u, float c,
                 float* __restrict out, float* __restrict input) {
  for (int64_t i = 0; i < n; ++i) {
    const float x_s = scale * x[i] - dt * (GUIDED ? u[i] + w * (v[i] - u[i]) : v[i]);
    out[i] = x_s;
    if (PAIR) input[i] = c * x_s;
  }
}

// out = scale x - dt (v_u + guidance (v - v_u)), input = input_scale out
extern "C" int euler_step(const EulerArguments* p) {
  const int64_t B = p->B, D = p->D;
  FASTCM_CHECK(p->x.check(B, D));
  FASTCM_CHECK(p->v.check(B * D));
  FASTCM_CHECK(p->dt.check_rows(B));
  if (p->v_uncond) {
    FASTCM_CHECK(p->v_uncond.check(B * D));
    FASTCM_CHECK(p->guidance.check_rows(B));
  }
  if (p->scale) FASTCM_CHECK(p->scale.check_rows(B));
  if (p->input_scale) FASTCM_CHECK(p->input_scale.check_rows(B));
  FASTCM_CHECK(p->out.check(B * D));
  if (p->input) FASTCM_CHECK(p->input.check(B * D));
  for_pieces(B, D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float x_piece[PIECE], v_piece[PIECE], u_piece[PIECE], piece[PIECE], second[PIECE];
    const int64_t at = sample * D + begin, m = padded(n);
    const float* x = p->x.load(sample, D, begin, n, x_piece);
    const float* v = load(p->v, at, n, v_piece);
    const float* u = p->v_uncond ? load(p->v_uncond, at, n, u_piece) : nullptr;
    const auto at_or = [&](const Tensor& t, float absent) { return t ? t.at(sample) : absent; };
    const float scale = at_or(p->scale, 1.0f), dt = p->dt.at(sample);
    const float w = at_or(p->guidance, 1.0f), c = at_or(p->input_scale, 1.0f);
    float* out = room(p->out, at, n, piece);
    float* input = p->input ? room(p->input, at, n, second) : nullptr;
    const auto take = u ? (input ? step<true, true> : step<true, false>)
                        : (input ? step<false, true> : step<false, false>);
    take(m, scale, x, dt, v, w, u, c, out, input);
    store(p->out, at, n, out);
    if (input) store(p->input, at, n, input);
  });
  return OK;
}

struct SamplerArguments {
  int64_t B, D, threads;
  Tensor x, F, a, b, alpha, sigma, key;
  Tensor F_uncond, guidance;  // both or none
  Tensor input_scale;         // may be absent
  int64_t stream, first;
  Tensor out, input;  // and the second result, which may be absent
};

// out = alpha (a x + b (F_u + guidance (F - F_u))) + sigma z, input = input_scale out
extern "C" int sampler_update(const SamplerArguments* p) {
  const int64_t B = p->B, D = p->D;
  FASTCM_CHECK(p->x.check(B * D));
  FASTCM_CHECK(p->F.check(B * D));
  for (const Tensor* c : {&p->a, &p->b, &p->alpha, &p->sigma}) FASTCM_CHECK(c->check_rows(B));
  FASTCM_CHECK(check_key(p->key));
  if (p->F_uncond) {
    FASTCM_CHECK(p->F_uncond.check(B * D));
    FASTCM_CHECK(p->guidance.check_rows(B));
  }
  if (p->input_scale) FASTCM_CHECK(p->input_scale.check_rows(B));
  FASTCM_CHECK(p->out.check(B * D));
  if (p->input) FASTCM_CHECK(p->input.check(B * D));
  const Noise noise(p->key, p->stream, p->first);
  for_pieces(B, D, p->threads, [&](int64_t sample, int64_t begin, int64_t n) {
    alignas(64) float z[PIECE], x_piece[PIECE], F_piece[PIECE], u_piece[PIECE], mixed[PIECE],
        piece[PIECE], second[PIECE];
    const int64_t at = sample * D + begin;
    noise.normals(sample, begin, n, z);
    const float* __restrict x = load(p->x, at, n, x_piece);
    const float* __restrict F = load(p->F, at, n, F_piece);
    if (p->F_uncond) {
      const float* __restrict u = load(p->F_uncond, at, n, u_piece);
      const float w = p->guidance.at(sample);
      for (int64_t i = 0; i < padded(n); ++i) mixed[i] = u[i] + w * (F[i] - u[i]);
      F = mixed;
    }
    const float a = p->a.at(sample), b = p->b.at(sample);
    const float alpha = p->alpha.at(sample), sigma = p->sigma.at(sample);
    float* __restrict out = room(p->out, at, n, piece);
    for (int64_t i = 0; i < padded(n); ++i) out[i] = alpha * (a * x[i] + b * F[i]) + sigma * z[i];
    if (p->input) {
      const float c = p->input_scale ? p->input_scale.at(sample) : 1.0f;
      float* __restrict input = room(p->input, at, n, second);
      for (int64_t i = 0; i < padded(n); ++i) input[i] = c * out[i];
      store(p->input, at, n, input);
    }
    store(p->out, at, n, out);
  });
  return OK;
}

struct NumberedSamplerArguments {
  int64_t key[3];  // seed, step, first sample
  SamplerArguments rest;
};

// As sampler_update, of a key that nobody made a tensor of
extern "C" int numbered_sampler_update(const NumberedSamplerArguments* p) {
  SamplerArguments arguments = p->rest;
  arguments.key = {const_cast<int64_t*>(p->key), I64, 3};
  return sampler_update(&arguments);
}
