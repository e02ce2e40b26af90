// The one-sweep optimizer on a CPU: squared gradient norm, scalars of the step, update.
//
// The same tables as the Triton kernels read (tables.py). Parameters, gradients and state are all
// of one type; the caller converts others. The sum of squares is taken chunk by chunk and added up
// in order, so its bits do not depend on the number of threads.

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace {

enum { PARAMETER, GRADIENT, OFFSET, NUMEL, GROUP };
enum { LR, BETA1, BETA2, EPS, WEIGHT_DECAY, L2, HYPER };
enum { W1, W2, DECAY, SIZE, A, B, ROW_L2, ROW = 8 };
constexpr int LANES = 64;

struct Table {
  const int64_t* tensors;
  int64_t n;
  const int32_t* chunks;
  int64_t num_chunks;
  int64_t chunk;

  int64_t get(int row, int64_t tensor) const { return tensors[row * n + tensor]; }
  int64_t tensor(int64_t c) const { return chunks[c]; }
  int64_t start(int64_t c) const { return chunks[num_chunks + c] * chunk; }
  int64_t length(int64_t c) const {
    return std::min(chunk, get(NUMEL, tensor(c)) - start(c));
  }
  template <typename T>
  T* at(int row, int64_t c) const {
    T* base = reinterpret_cast<T*>(get(row, tensor(c)));
    return base ? base + start(c) : nullptr;
  }
};

template <typename T>
void grad_norm(const Table& table, double* partial, const int64_t* bounds, int64_t classes,
               double* sums, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < table.num_chunks; ++c) {
    const T* g = table.at<const T>(GRADIENT, c);
    const int64_t length = g ? table.length(c) : 0;
    T lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= length; i += LANES)
      for (int k = 0; k < LANES; ++k) lanes[k] += g[i + k] * g[i + k];
    double sum = 0;
    for (int k = 0; k < LANES; ++k) sum += lanes[k];
    for (; i < length; ++i) sum += double(g[i]) * g[i];
    partial[c] = sum;
  }
  for (int64_t k = 0; k < classes; ++k) {
    sums[k] = 0;
    for (int64_t c = bounds[k]; c < bounds[k + 1]; ++c) sums[k] += partial[c];
  }
}

template <typename T>
void tick(const Table& table, const double* hyper, const double* limit, const double* sums,
          int64_t classes, float* steps, T* rows, T* shared, T* norm, int64_t* counts,
          bool radam) {
  double clip = 1;
  bool apply = true;
  if (sums) {
    double total = 0;
    for (int64_t k = 0; k < classes; ++k) total += sums[k];
    total = std::sqrt(total);
    apply = std::isfinite(total);
    clip = std::min(1.0, *limit / (total + 1e-6));
    *norm = T(total);
  }
  shared[0] = T(clip);
  shared[1] = T(apply);
  counts[0] += 1;
  counts[1] += !apply;
  counts[2] = apply ? 0 : counts[2] + 1;
  if (!apply) return;
  for (int64_t i = 0; i < table.n; ++i) {
    if (!table.get(GRADIENT, i)) continue;
    const double* h = hyper + HYPER * table.get(GROUP, i);
    T* row = rows + ROW * i;
    const double k = steps[i] += 1;
    const double c1 = 1 - std::pow(h[BETA1], k), power = std::pow(h[BETA2], k), c2 = 1 - power;
    double size = h[LR] / c1, a = 1 / std::sqrt(c2), b = h[EPS];
    if (radam) {
      const double limit = 2 / (1 - h[BETA2]) - 1, rho = limit - 2 * k * power / c2;
      a = rho > 5;
      b = rho > 5 ? h[EPS] : 1;
      if (rho > 5)
        size *= std::sqrt(c2 * (rho - 4) * (rho - 2) * limit / ((limit - 4) * (limit - 2) * rho));
    }
    row[W1] = T(1 - h[BETA1]);
    row[W2] = T(1 - h[BETA2]);
    row[DECAY] = T(h[LR] * h[WEIGHT_DECAY]);
    row[SIZE] = T(size);
    row[A] = T(a);
    row[B] = T(b);
    row[ROW_L2] = T(h[L2]);
  }
}

template <typename T>
void update(T* __restrict x, const T* __restrict g, T* __restrict m, T* __restrict v,
            T* __restrict average, int64_t length, const T* row, T clip, T rate) {
  const T w1 = row[W1], w2 = row[W2], decay = row[DECAY], size = row[SIZE], a = row[A],
          b = row[B], l2 = row[ROW_L2];
  for (int64_t i = 0; i < length; ++i) {
    const T d = g[i] * clip + l2 * x[i];
    m[i] += w1 * (d - m[i]);
    v[i] += w2 * (d * d - v[i]);
    x[i] -= decay * x[i] + size * m[i] / (std::sqrt(v[i]) * a + b);
    if (average) average[i] += rate * (x[i] - average[i]);
  }
}

template <typename T>
void sweep(const Table& table, T* moments, int64_t total, const int64_t* averages, int count,
           const T* rows, const T* shared, int threads) {
  if (shared[1] == 0) return;
  const T clip = shared[0];
  const T* rates = shared + 2;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t c = 0; c < table.num_chunks; ++c) {
    const int64_t tensor = table.tensor(c), length = table.length(c);
    const int64_t at = table.get(OFFSET, tensor) + table.start(c);
    T* x = table.at<T>(PARAMETER, c);
    const T* g = table.at<const T>(GRADIENT, c);
    int next = 0;
    if (g) {  // the first average in the same loop
      T* m = moments + at;
      T* first = count ? reinterpret_cast<T*>(averages[0]) + at : nullptr;
      update(x, g, m, m + total, first, length, rows + ROW * tensor, clip, rates[0]);
      next = 1;
    }
    for (int j = next; j < count; ++j) {
      T* __restrict e = reinterpret_cast<T*>(averages[j]) + at;
      const T* __restrict y = x;
      for (int64_t i = 0; i < length; ++i) e[i] += rates[j] * (y[i] - e[i]);
    }
  }
}

}  // namespace

#define EXPORT(T, SUFFIX)                                                                         \
  extern "C" void grad_norm_##SUFFIX(const Table* table, double* partial, const int64_t* bounds,  \
                                     int64_t classes, double* sums, int threads) {                \
    grad_norm<T>(*table, partial, bounds, classes, sums, threads);                                \
  }                                                                                               \
  extern "C" void tick_##SUFFIX(const Table* table, const double* hyper, const double* limit,     \
                                const double* sums, int64_t classes, float* steps, T* rows,       \
                                T* shared, T* norm, int64_t* counts, bool radam) {                \
    tick<T>(*table, hyper, limit, sums, classes, steps, rows, shared, norm, counts, radam);       \
  }                                                                                               \
  extern "C" void sweep_##SUFFIX(const Table* table, T* moments, int64_t total,                   \
                                 const int64_t* averages, int count, const T* rows,               \
                                 const T* shared, int threads) {                                  \
    sweep<T>(*table, moments, total, averages, count, rows, shared, threads);                     \
  }

EXPORT(float, float32)
EXPORT(double, float64)
