// The C++ kernel of kernels/attention/cpp.py, which says what it computes; shapes are those of kernels/plan.py.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <system_error>
#include <thread>
#include <vector>

namespace {

#ifdef __AVX512F__
constexpr int WIDTH = 16;
#else
constexpr int WIDTH = 8;
#endif
typedef float Vec __attribute__((vector_size(4 * WIDTH)));
typedef int32_t Ints __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));

// A tile of a product that stays in registers, and the largest blocks of a plan, queries rounded up to ROWS.
constexpr int ROWS = 6, COLUMNS = 2 * WIDTH, QUERIES = 132, KEYS = 64;
constexpr float INF = std::numeric_limits<float>::infinity();
#define UNROLL _Pragma("GCC unroll 8")

inline Vec load(const float* from) { return *(const Unaligned*)from; }
inline void store(float* to, Vec x) { *(Unaligned*)to = x; }

// exp(x) for x <= 0 to a few units in the last place (Cephes' polynomial); 0 below -87. NaN stays NaN.
inline Vec exponential(Vec x) {
  const Vec lowest = Vec{} - 87.0f;
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  Vec y = x < lowest ? lowest : x;
  Vec rounded = y * 1.44269504f + shift, n = rounded - shift;
  Vec r = y - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = Vec{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  Ints power = ((Ints)rounded - 0x4B400000 + 127) << 23;
  return x < lowest ? Vec{} : p * (Vec)power;
}

// C[m,n] = A[m,k] B[k,n], or += with ADD. Whole tiles are computed, so C has room for them. B lies in panels of
// COLUMNS columns, each `depth` rows long: every row of a panel follows the one above.
template <bool ADD>
void multiply(int m, int n, int k, const float* A, int lda, const float* B, int depth, float* C, int ldc) {
  for (int j = 0; j < n; j += COLUMNS)
    for (int i = 0; i < m; i += ROWS) {
      Vec c[ROWS][2];
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int h = 0; h < 2; h++)
          c[r][h] = ADD ? load(C + (i + r) * ldc + j + h * WIDTH) : Vec{};
      const float *a = A + i * lda, *b = B + (int64_t)j * depth;
      for (int t = 0; t < k; t++, b += COLUMNS) {
        Vec left = load(b), right = load(b + WIDTH);
        UNROLL for (int r = 0; r < ROWS; r++) {
          c[r][0] += a[r * lda + t] * left;
          c[r][1] += a[r * lda + t] * right;
        }
      }
      UNROLL for (int r = 0; r < ROWS; r++)
        UNROLL for (int h = 0; h < 2; h++)
          store(C + (i + r) * ldc + j + h * WIDTH, c[r][h]);
    }
}

// Row t of at most KEYS keys becomes column t of panels of D rows; row t of the values a row of panels of KEYS rows.
void pack(int t, int D, const float* key, const float* value, float* keys, float* values) {
  float* column = keys + t / COLUMNS * COLUMNS * D + t % COLUMNS;
  for (int d = 0; d < D; d++) column[d * COLUMNS] = key[d];
  for (int d = 0; d < D; d += COLUMNS)
    std::memcpy(values + d * KEYS + t * COLUMNS, value + d, 4 * std::min(COLUMNS, D - d));
}

// task(i, thread) for each i < tasks. Threads take the next task when they are done with one.
template <class Task>
void parallel(int tasks, int threads, Task task) {
  std::atomic<int> next{0};
  auto work = [&](int thread) {
    for (int i; (i = next++) < tasks;) task(i, thread);
  };
  std::vector<std::thread> others;
  try {
    for (int thread = 1; thread < std::min(threads, tasks); thread++) others.emplace_back(work, thread);
  } catch (const std::system_error&) {
  }  // fewer threads do as well
  work(0);
  for (auto& other : others) other.join();
}

}  // namespace

// wide: D rounded up to whole panels of any WIDTH. terms: heads that `matrices` holds. Strides in elements.
struct Sizes {
  int64_t B, H, L, D, wide, Cq, Ck, terms, query_strides[3], out_strides[3];
};

// Floats that `attend` needs: of all heads, and of each thread.
extern "C" int64_t shared_floats(const Sizes* s) { return s->B * s->H * s->Ck * 2 * KEYS * s->wide; }
extern "C" int64_t thread_floats(const Sizes* s) {
  return QUERIES * (3 * s->wide + KEYS + 3) + 2 * KEYS * s->wide + s->wide * s->D;
}

extern "C" void attend(const Sizes* sizes, const float* query, const float* key, const float* value,
                       const float* key_centroids, const float* value_centroids, const float* bias,
                       const int32_t* query_order, const int32_t* query_offsets, const int32_t* key_offsets,
                       const int32_t* kept_count, const int32_t* kept_blocks, const int32_t* places,
                       const float* matrices, float scale, int threads, float* shared, float* of_threads,
                       float* out) {
  const auto [B, H, L, D, wide, Cq, Ck, terms, query_strides, out_strides] = *sizes;
  const int64_t panel = KEYS * wide;
  parallel(B * H * Ck, threads, [&](int block, int) {
    const int64_t head = block / Ck, first = key_offsets[head * (Ck + 1) + block % Ck];
    const int64_t end = key_offsets[head * (Ck + 1) + block % Ck + 1];
    float* keys = shared + block * 2 * panel;
    for (int64_t t = first; t < end; t++)
      pack(t - first, D, key + (head * L + t) * D, value + (head * L + t) * D, keys, keys + panel);
  });
  parallel(B * H * Cq, threads, [&](int block, int thread) {
    const int64_t head = block / Cq, i = block % Cq, first = query_offsets[head * (Cq + 1) + i];
    const int m = query_offsets[head * (Cq + 1) + i + 1] - first;
    const int32_t* tokens = query_order + head * L + first;
    float* q = of_threads + thread * thread_floats(sizes);
    float *o = q + QUERIES * wide, *extra = o + QUERIES * wide, *s = extra + QUERIES * wide;
    float *top = s + QUERIES * KEYS, *sum = top + QUERIES, *skipped = sum + QUERIES;
    float *keys = skipped + QUERIES, *values = keys + panel, *matrix = values + panel;
    auto row = [&](auto* x, const int64_t* strides, int r) {
      return x + head / H * strides[0] + head % H * strides[1] + tokens[r] * strides[2];
    };
    for (int r = 0; r < m; r++) std::memcpy(q + r * wide, row(query, query_strides, r), 4 * D);
    std::fill(o, extra, 0.0f);
    std::fill(top, sum, -INF);
    std::fill(sum, keys, 0.0f);

    // n more keys and values take part in the softmax; biases: centroids, otherwise tokens.
    auto meet = [&](int n, const float* keys, const float* values, const float* biases) {
      multiply<false>(m, KEYS, D, q, wide, keys, D, s, KEYS);
      for (int r = 0; r < m; r++) {
        float* x = s + r * KEYS;
        for (int t = 0; t < KEYS; t++) x[t] *= scale;
        for (int t = 0; biases && t < n; t++) x[t] += biases[t];
        std::fill(x + n, x + KEYS, -INF);
        Vec most = load(x);
        for (int t = WIDTH; t < KEYS; t += WIDTH) most = load(x + t) > most ? load(x + t) : most;
        float high = top[r];
        for (int t = 0; t < WIDTH; t++) high = std::max(high, most[t]);
        if (high == -INF && std::any_of(x, x + n, [](float y) { return y != y; })) high = 0;
        if (high == -INF) {
          std::fill(x, x + KEYS, 0.0f);
          continue;
        }
        if (high > top[r]) {
          const float shrink = std::exp(top[r] - high);
          top[r] = high, sum[r] *= shrink, skipped[r] *= shrink;
          for (int d = 0; d < D; d++) o[r * wide + d] *= shrink;
        }
        Vec weights = {};
        for (int t = 0; t < KEYS; t += WIDTH) {
          Vec weight = exponential(load(x + t) - high);
          store(x + t, weight);
          weights += weight;
        }
        float all = 0;
        for (int t = 0; t < WIDTH; t++) all += weights[t];
        sum[r] += all;
        if (biases) skipped[r] += all;
      }
      multiply<true>(m, D, n, s, KEYS, values, KEYS, o, wide);
    };

    const int32_t* kept = kept_blocks + block * Ck;
    for (int c = 0; c < kept_count[block]; c++) {
      const int32_t* ends = key_offsets + head * (Ck + 1) + kept[c];
      const float* packed = shared + (head * Ck + kept[c]) * 2 * panel;
      meet(ends[1] - ends[0], packed, packed + panel, nullptr);
    }
    float biases[KEYS];
    int n = 0;
    for (int64_t j = 0; j < Ck; j++) {
      if ((biases[n] = bias[block * Ck + j]) != -INF)
        pack(n++, D, key_centroids + (head * Ck + j) * D, value_centroids + (head * Ck + j) * D, keys, values);
      if (n == KEYS || (n && j == Ck - 1)) meet(n, keys, values, biases), n = 0;
    }

    const int place = terms ? places[head % H] : -1;
    if (place >= 0) {
      const float* from = matrices + ((head / H * terms + place) * Cq + i) * D * D;
      for (int d = 0; d < D; d++)
        for (int e = 0; e < D; e += COLUMNS)
          std::memcpy(matrix + e * D + d * COLUMNS, from + d * D + e, 4 * std::min<int64_t>(COLUMNS, D - e));
      multiply<false>(m, D, D, q, wide, matrix, D, extra, wide);
    }
    for (int r = 0; r < m; r++) {
      float *to = row(out, out_strides, r), *x = o + r * wide;
      for (int d = 0; d < D; d++) to[d] = sum[r] == 0 ? 0 : x[d] / sum[r];
      for (int d = 0; place >= 0 && d < D && sum[r] != 0; d++) to[d] += skipped[r] / sum[r] * extra[r * wide + d];
    }
  });
}
