// The loss of a batch and its gradient on a CPU: the twin of consistency_loss.py.
//
// F is read once. Sums are taken over pieces of a sample, each in sixteen lanes, and then over the
// pieces in float64: always in this order, whatever the number of threads.

#include <cmath>
#include <vector>

#include "philox.h"

using namespace fastcm;

enum Metric : int64_t { SQUARED_L2, L2, L1, PSEUDO_HUBER };

struct LossArguments {
  int64_t B, D, threads;
  Tensor F;
  State x;
  Tensor a, b;
  State y;
  int64_t shared;  // whether y has the x0 and the z of x
  Tensor target_F, target_a, target_b, weight;
  int64_t metric;
  double c, gradient_scale;
  Tensor values, gradient;
};

// r = a x + b F - y for a piece of a sample, where y may be target_a y + target_b target_F
static void residual(const LossArguments& p, int64_t sample, int64_t begin, int64_t n,
                     float* __restrict r) {
  alignas(64) float z[PIECE], F_piece[PIECE], x_piece[PIECE], y_piece[PIECE];
  const int64_t at = sample * p.D + begin, m = padded(n);
  if (p.shared) p.x.noise().normals(sample, begin, n, z);
  const float* z_ = p.shared ? z : nullptr;
  const float* __restrict x = p.x.load(sample, p.D, begin, n, x_piece, z_);
  const float* __restrict F = load(p.F, at, n, F_piece);
  const float a = p.a.at(sample), b = p.b.at(sample);
  for (int64_t i = 0; i < m; ++i) r[i] = a * x[i] + b * F[i];
  const float* __restrict y = p.y.load(sample, p.D, begin, n, y_piece, z_);
  if (p.target_F) {
    const float* __restrict G = load(p.target_F, at, n, F_piece);
    const float ya = p.target_a.at(sample), yb = p.target_b.at(sample);
    for (int64_t i = 0; i < m; ++i) r[i] -= ya * y[i] + yb * G[i];
  } else {
    for (int64_t i = 0; i < m; ++i) r[i] -= y[i];
  }
  // what fills up the last vector adds nothing: all operands are 0 there but noise
  std::fill(r + n, r + m, 0.0f);
}

static double sum(int64_t metric, const float* __restrict r, int64_t n) {
  float lanes[VECTOR] = {};
  for (int64_t i = 0; i < padded(n); i += VECTOR)
    for (int64_t k = 0; k < VECTOR; ++k)
      lanes[k] += metric == L1 ? std::fabs(r[i + k]) : r[i + k] * r[i + k];
  double total = 0.0;
  for (const float lane : lanes) total += lane;
  return total;
}

// The metric of a sample from its sum, and the factor on its direction.
static void evaluate(const LossArguments& p, int64_t sample, double total, float& factor) {
  double value = total, slope = p.metric == SQUARED_L2 ? 2.0 : 1.0;
  if (p.metric == L2) {
    value = std::sqrt(total);
    slope = value == 0.0 ? 1.0 : 1.0 / value;
  } else if (p.metric == PSEUDO_HUBER) {
    const double root = std::sqrt(total + p.c * p.c);
    value = total / (root + p.c);  // root - c without its cancellation
    slope = 1.0 / root;
  }
  const float weight = p.weight ? p.weight.at(sample) : 1.0f;
  static_cast<float*>(p.values.data)[sample] = float(value) * weight;
  factor = float(slope * p.gradient_scale) * weight * p.b.at(sample);
}

static void differentiate(const LossArguments& p, int64_t at, int64_t n, float factor,
                          float* __restrict r) {
  alignas(64) float piece[PIECE];
  float* out = room(p.gradient, at, n, piece);
  for (int64_t i = 0; i < padded(n); ++i) {
    const float direction =
        p.metric == L1 ? (r[i] > 0.0f ? 1.0f : r[i] < 0.0f ? -1.0f : r[i]) : r[i];
    out[i] = factor * direction;
  }
  store(p.gradient, at, n, out);
}

static Error check(const LossArguments& p) {
  const int64_t B = p.B, D = p.D;
  FASTCM_CHECK(p.F.check(B * D));
  FASTCM_CHECK(p.x.check(B, D));
  FASTCM_CHECK(p.y.check(B, D));
  FASTCM_CHECK(p.a.check_rows(B));
  FASTCM_CHECK(p.b.check_rows(B));
  if (p.target_F) {
    FASTCM_CHECK(p.target_F.check(B * D));
    FASTCM_CHECK(p.target_a.check_rows(B));
    FASTCM_CHECK(p.target_b.check_rows(B));
  }
  if (p.weight) FASTCM_CHECK(p.weight.check_rows(B));
  if (p.values.dtype != F32) return WRONG_DTYPE;
  FASTCM_CHECK(p.values.check_size(B));
  if (p.shared && !(p.x.alpha && p.y.alpha)) return NO_CLOSED_FORM;
  return p.gradient.check(B * D);
}

extern "C" int consistency_loss(const LossArguments* arguments) {
  const LossArguments& p = *arguments;
  FASTCM_CHECK(check(p));
  const int64_t pieces = (p.D + PIECE - 1) / PIECE, room = pieces * PIECE;
  const int threads = p.B * p.D < ALONE ? 1 : int(p.threads);
  if (p.B >= threads) {  // a sample to a thread: its residual stays in the cache
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
      std::vector<float> r(room);
#pragma omp for schedule(static)
      for (int64_t sample = 0; sample < p.B; ++sample) {
        double total = 0.0;
        for (int64_t begin = 0; begin < p.D; begin += PIECE) {
          const int64_t n = std::min(PIECE, p.D - begin);
          residual(p, sample, begin, n, &r[begin]);
          total += sum(p.metric, &r[begin], n);
        }
        float factor;
        evaluate(p, sample, total, factor);
        for (int64_t begin = 0; begin < p.D; begin += PIECE)
          differentiate(p, sample * p.D + begin, std::min(PIECE, p.D - begin), factor, &r[begin]);
      }
    }
    return OK;
  }
  std::vector<float> r(p.B * room), factors(p.B);
  std::vector<double> sums(p.B * pieces);
  for_pieces(p.B, p.D, threads, [&](int64_t sample, int64_t begin, int64_t n) {
    residual(p, sample, begin, n, &r[sample * room + begin]);
    sums[sample * pieces + begin / PIECE] = sum(p.metric, &r[sample * room + begin], n);
  });
  for (int64_t sample = 0; sample < p.B; ++sample) {
    double total = 0.0;
    for (int64_t k = 0; k < pieces; ++k) total += sums[sample * pieces + k];
    evaluate(p, sample, total, factors[sample]);
  }
  for_pieces(p.B, p.D, threads, [&](int64_t sample, int64_t begin, int64_t n) {
    differentiate(p, sample * p.D + begin, n, factors[sample], &r[sample * room + begin]);
  });
  return OK;
}
