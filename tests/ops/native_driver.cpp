// Calls every native entry on buffers of exactly the size it is told, under the sanitizers.

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "affine.cpp"
#include "consistency_loss.cpp"
#include "noising.cpp"

extern "C" {
struct OptimizerTable {
  const int64_t* tensors;
  int64_t n;
  const int32_t* chunks;
  int64_t num_chunks, chunk;
};
void grad_norm_float32(const OptimizerTable*, double*, const int64_t*, int64_t, double*, int);
void tick_float32(const OptimizerTable*, const double*, const double*, const double*, int64_t,
                  float*, float*, float*, float*, int64_t*, bool);
void sweep_float32(const OptimizerTable*, float*, int64_t, const int64_t*, int, const float*,
                   const float*, int);
}

static std::vector<std::unique_ptr<char[]>> held;

static Tensor tensor(int64_t dtype, int64_t n) {
  const int64_t sizes[] = {0, 4, 2, 2, 1, 8, 8};
  const int64_t bytes = n * sizes[dtype];
  held.emplace_back(new char[bytes]);
  std::memset(held.back().get(), 1, bytes);
  return {held.back().get(), dtype, n};
}

static const Tensor nothing{nullptr, NONE, 0};

static State state(int64_t dtype, int64_t B, int64_t D, bool closed) {
  if (!closed) return {tensor(dtype, B * D), nothing, nothing, nothing, 0, 0};
  return {tensor(dtype, B * D), tensor(F64, B), tensor(F32, B), tensor(I64, 3), 7, 5};
}

static void check(int error) {
  if (error) std::printf("refused: %d\n", error), std::exit(1);
}

static void pointwise(int64_t B, int64_t D, int64_t dtype, bool closed) {
  const auto rows = [&] { return tensor(F32, B); };
  const auto samples = [&](int64_t of) { return tensor(of, B * D); };
  const int64_t x = closed ? int64_t(U8) : dtype;
  const NoiseArguments a{B, D, 2, tensor(I64, 3), 255, 4, samples(dtype)};
  check(noise(&a));
  const NoiseArguments u{B, 1, 2, tensor(I64, 3), 1, 4, tensor(F64, B)};
  check(uniform(&u));
  State pair = state(x, B, D, true);
  pair.alpha = tensor(F64, 2 * B), pair.sigma = tensor(F32, 2 * B);
  const NoisingArguments n{B, D, 2, pair, {samples(dtype), samples(dtype)}};
  check(noising(&n));
  const BoundaryArguments b{B, D, 2, state(x, B, D, closed), samples(dtype), rows(), rows(), samples(F32)};
  check(boundary(&b));
  const ScaleArguments s{B, D, 2, samples(dtype), rows(), samples(dtype)};
  check(scale(&s));
  const EulerArguments e{B, D, 2, state(x, B, D, closed), samples(dtype), rows(), samples(dtype),
                         rows(), rows(), rows(), samples(F32), samples(dtype)};
  check(euler_step(&e));
  const SamplerArguments m{B, D, 2, samples(dtype), samples(dtype), rows(), rows(), rows(), rows(),
                           tensor(I64, 3), samples(dtype), rows(), rows(), 20, 0, samples(F32),
                           samples(dtype)};
  check(sampler_update(&m));
  for (int64_t metric = 0; metric < 4; ++metric) {
    const LossArguments l{B, D, 2, samples(dtype), state(x, B, D, closed), rows(), rows(),
                          state(closed ? int64_t(U8) : int64_t(F32), B, D, closed), closed,
                          samples(dtype), rows(), rows(), rows(), metric, 0.1, 0.5,
                          tensor(F32, B), samples(dtype)};
    check(consistency_loss(&l));
  }
  held.clear();
}

static void optimizer() {
  const int64_t sizes[] = {5, 1030}, total = 1035;
  const Tensor p[] = {tensor(F32, 5), tensor(F32, 1030)}, g[] = {tensor(F32, 5), tensor(F32, 1030)};
  const auto at = [](const Tensor& t) { return reinterpret_cast<int64_t>(t.data); };
  const int64_t tensors[] = {at(p[0]), at(p[1]), at(g[0]), at(g[1]), 0, 5, sizes[0], sizes[1], 0, 0};
  const int32_t chunks[] = {0, 1, 1, 0, 0, 1};
  const OptimizerTable table{tensors, 2, chunks, 3, 1024};
  const int64_t bounds[] = {0, 3};
  double partial[3], sums[1], limit[] = {1.0}, hyper[] = {1e-3, 0.9, 0.999, 1e-8, 0.01, 0.0};
  float steps[2] = {}, rows[16], shared[3] = {1, 1, 0.1f}, norm[1];
  int64_t counts[3] = {};
  grad_norm_float32(&table, partial, bounds, 1, sums, 2);
  tick_float32(&table, hyper, limit, sums, 1, steps, rows, shared, norm, counts, true);
  const Tensor moments = tensor(F32, 2 * total), average = tensor(F32, total);
  const int64_t averages[] = {at(average)};
  sweep_float32(&table, static_cast<float*>(moments.data), total, averages, 1, rows, shared, 2);
  held.clear();
}

int main() {
  for (int64_t B : {0, 1, 3, 40})
    for (int64_t D : {1, 5, 1024, 1025, 4097})
      for (int64_t dtype : {F32, BF16, F16})
        for (bool closed : {false, true}) pointwise(B, D, dtype, closed);
  optimizer();
  std::puts("clean");
}
