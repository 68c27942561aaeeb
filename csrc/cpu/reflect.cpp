// reflect and its gradients, one pass over the rows (hra_kernels/reference.py: reflect_fwd, reflect_bwd):
//
//   forward    p = x vᵀ,  s = -p m,  y = x + s v
//   backward   q = dy vᵀ,  b = -q mᵀ,  dx = dy + b v,  a = -p m,  dv = sum over rows of a dy + b x,  dm = -pᵀ q
//
// A block of rows stays in L2 between its product with vᵀ and its update, so memory sees the 2 M D elements of the
// forward and the 3 M D of the backward once. Arithmetic: 2 R multiply-adds an element forward, 4 R backward; at R = 8
// and two 16-lane units that is 8 and 16 cycles for 64 bytes.
//
// Each task owns one contiguous range of rows, and dv and dm of its own: first summed in registers over a block, then
// over the blocks, then over the tasks in their order. The result depends on the number of tasks and on nothing else.
#include "scratch.h"
#include "tiles.h"

namespace hra::cpu::HRA_ISA {
namespace {

// 24 vectors of v for 8 columns are 12 KiB with 64-byte vectors: v and the rows streaming past fit 32 KiB of L1. A
// multiple of every tile's number of vectors.
constexpr int64_t kChunkVecs = 24;
constexpr int64_t kBlockBytes = 512 * 1024;  // of x: a quarter to a half of the L2 of current server cores
constexpr int64_t kMaxBlockRows = 48;
// Below this many multiply-adds a second thread costs more than it saves: one thread does them in about 20 us.
constexpr int64_t kParallelWork = 500 * 1000;

int64_t block_rows(int64_t D, int64_t element) {
  const int64_t rows = kBlockBytes / larger(1, D * element) / kApplyRows * kApplyRows;
  return smaller(kMaxBlockRows, larger(kApplyRows, rows));
}

int count_tasks(int64_t M, int64_t D, int64_t R, int num_threads) {
  if (M * D * R < kParallelWork) return 1;
  return static_cast<int>(larger(1, smaller(num_threads, (M + kApplyRows - 1) / kApplyRows)));
}

struct Range {
  int64_t begin, end;
};

// The rows of one task: as even as whole tiles allow.
Range rows_of(int task, int tasks, int64_t M) {
  const int64_t tiles = (M + kApplyRows - 1) / kApplyRows;
  return {smaller(M, tiles * task / tasks * kApplyRows), smaller(M, tiles * (task + 1) / tasks * kApplyRows)};
}

// What a task's block of rows is worked on with.
template <class T>
struct Block {
  using C = Accumulator<T>;
  Packed<C> v;
  int64_t stride_s;  // of p, q, a and b in the scratch memory: R rounded up, zero beyond R
  Vec<C>* sums;      // partial sums of one block's products with vᵀ

  int64_t full() const { return v.D / kLanes<C>; }
  int tail() const { return static_cast<int>(v.D % kLanes<C>); }
};

template <class T, int G, class C = Accumulator<T>>
HRA_INLINE void dot_group(const Block<T>& block, const T* x, int64_t stride_xm, int64_t rows, int64_t g, int64_t first,
                          int64_t last) {
  const C* v = block.v.at(g, first);
  Vec<C>* sums = block.sums + g * kMaxBlockRows * kGroup;
  int64_t m = 0;
  for (; m + kDotRows <= rows; m += kDotRows)
    dot_tile<T, kDotRows, G>(sums + m * G, first == 0, x + m * stride_xm, stride_xm, v, block.v.step(), first, last,
                             block.full(), block.tail());
  for (; m < rows; ++m)
    dot_tile<T, 1, G>(sums + m * G, first == 0, x + m * stride_xm, stride_xm, v, block.v.step(), first, last,
                      block.full(), block.tail());
}

template <class C, int G>
HRA_INLINE void finish_dots(C* p, int64_t stride_p, const Vec<C>* sums, int64_t rows) {
  for (int64_t m = 0; m < rows; ++m) sum_lanes<C, G>(p + m * stride_p, sums + m * G);
}

// p (rows, stride_s) = x vᵀ.
template <class T, class C = Accumulator<T>>
void dots(C* p, const Block<T>& block, const T* x, int64_t stride_xm, int64_t rows) {
  const int64_t vecs = block.v.vecs();
  if (vecs == 0) std::memset(p, 0, static_cast<size_t>(rows * block.stride_s) * sizeof(C));
  for (int64_t first = 0; first < vecs; first += kChunkVecs) {
    const int64_t last = smaller(vecs, first + kChunkVecs);
    for (int64_t g = 0; g < block.v.groups(); ++g) switch (block.v.width(g)) {
        case 1:
          dot_group<T, 1>(block, x, stride_xm, rows, g, first, last);
          break;
        case 2:
          dot_group<T, 2>(block, x, stride_xm, rows, g, first, last);
          break;
        case 4:
          dot_group<T, 4>(block, x, stride_xm, rows, g, first, last);
          break;
        default:
          dot_group<T, kGroup>(block, x, stride_xm, rows, g, first, last);
      }
  }
  for (int64_t g = 0; vecs > 0 && g < block.v.groups(); ++g) {
    const Vec<C>* sums = block.sums + g * kMaxBlockRows * kGroup;
    C* to = p + g * kGroup;
    switch (block.v.width(g)) {
      case 1:
        finish_dots<C, 1>(to, block.stride_s, sums, rows);
        break;
      case 2:
        finish_dots<C, 2>(to, block.stride_s, sums, rows);
        break;
      case 4:
        finish_dots<C, 4>(to, block.stride_s, sums, rows);
        break;
      default:
        finish_dots<C, kGroup>(to, block.stride_s, sums, rows);
    }
  }
}

template <class T, int ROWS, class C = Accumulator<T>>
HRA_INLINE void apply_rows(T* y, int64_t stride_ym, const T* x, int64_t stride_xm, const C* s, const Block<T>& block,
                           int64_t first, int64_t last, const T* ahead, int64_t stride_ahead) {
  const int64_t end = smaller(last, block.full());
  int64_t k = first;
  for (; k + kApplyVecs <= end; k += kApplyVecs)
    apply_tile<T, ROWS, kApplyVecs, false>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, 0, ahead,
                                           stride_ahead);
  for (; k < end; ++k)
    apply_tile<T, ROWS, 1, false>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, 0, ahead, stride_ahead);
  if (k < last)
    apply_tile<T, ROWS, 1, true>(y, stride_ym, x, stride_xm, s, block.stride_s, block.v, k, block.tail(), ahead,
                                 stride_ahead);
}

// y = x + s v on the vectors [first, last) of the block's rows; `ahead` is null or as many rows that are needed next.
template <class T, class C = Accumulator<T>>
void apply(T* y, int64_t stride_ym, const T* x, int64_t stride_xm, const C* s, const Block<T>& block, int64_t rows,
           int64_t first, int64_t last, const T* ahead, int64_t stride_ahead) {
  const auto ahead_of = [&](int64_t m) { return ahead != nullptr ? ahead + m * stride_ahead : nullptr; };
  int64_t m = 0;
  for (; m + kApplyRows <= rows; m += kApplyRows)
    apply_rows<T, kApplyRows>(y + m * stride_ym, stride_ym, x + m * stride_xm, stride_xm, s + m * block.stride_s, block,
                              first, last, ahead_of(m), stride_ahead);
  for (; m < rows; ++m)
    apply_rows<T, 1>(y + m * stride_ym, stride_ym, x + m * stride_xm, stride_xm, s + m * block.stride_s, block, first,
                     last, ahead_of(m), stride_ahead);
}

// out (R, :) += aᵀ first + bᵀ second over the rows of a block, vectors [begin, end) of `full` whole ones and a tail.
template <class T, class C>
struct Outer {
  C* out;
  int64_t stride_out;
  bool fresh;
  const C* a;
  const T* first;
  int64_t stride_first;
  const C* b;
  const T* second;
  int64_t stride_second;
  int64_t stride_ab, rows;
  int64_t full;
  int tail;
};

template <class T, int G, int VECS, bool kPartial, bool kTwo, class C>
HRA_INLINE void outer_at(const Outer<T, C>& o, int64_t r, int64_t k) {
  const int64_t d = k * kLanes<C>;
  outer_tile<T, G, VECS, kPartial, kTwo>(o.out + r * o.stride_out + d, o.stride_out, o.fresh, o.a + r, o.first + d,
                                         o.stride_first, kTwo ? o.b + r : nullptr, kTwo ? o.second + d : nullptr,
                                         o.stride_second, o.stride_ab, o.rows, o.tail);
}

template <class T, int G, bool kTwo, class C>
HRA_INLINE void outer_group(const Outer<T, C>& o, int64_t r, int64_t begin, int64_t end) {
  const int64_t whole = smaller(end, o.full);
  int64_t k = begin;
  for (; k + kOuterVecs <= whole; k += kOuterVecs) outer_at<T, G, kOuterVecs, false, kTwo>(o, r, k);
  for (; k < whole; ++k) outer_at<T, G, 1, false, kTwo>(o, r, k);
  if (k < end) outer_at<T, G, 1, true, kTwo>(o, r, k);
}

template <class T, bool kTwo, class C, class C2>
HRA_INLINE void outer(const Outer<T, C>& o, const Packed<C2>& shape, int64_t begin, int64_t end) {
  for (int64_t g = 0; g < shape.groups(); ++g) switch (shape.width(g)) {
      case 1:
        outer_group<T, 1, kTwo>(o, g * kGroup, begin, end);
        break;
      case 2:
        outer_group<T, 2, kTwo>(o, g * kGroup, begin, end);
        break;
      case 4:
        outer_group<T, 4, kTwo>(o, g * kGroup, begin, end);
        break;
      default:
        outer_group<T, kGroup, kTwo>(o, g * kGroup, begin, end);
    }
}

// -m, or -mᵀ if `flip`, with rows `stride` apart and zeros beyond R.
template <class C>
void negated(C* to, const C* t, int64_t R, int64_t stride, bool flip) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) to[i * stride + j] = -(flip ? t[j * R + i] : t[i * R + j]);
    for (int64_t j = R; j < stride; ++j) to[i * stride + j] = 0;
  }
}

template <class T>
struct Forward {
  using C = Accumulator<T>;
  const ReflectFwdParams& params;
  int tasks;
  int64_t stride_s, packed, sums, p, s, m;
  Scratch scratch;

  Forward(const ReflectFwdParams& params, int num_threads) : params(params) {
    const int64_t D = params.D, R = params.R;
    tasks = count_tasks(params.M, D, R, num_threads);
    stride_s = round_up(R, larger(kGroup, kLanes<C>));
    packed = scratch.add<C>(Packed<C>{nullptr, R, D}.size());
    sums = scratch.add<Vec<C>>(round_up(R, kGroup) * kMaxBlockRows);
    p = scratch.add<C>(kMaxBlockRows * stride_s);
    s = scratch.add<C>(kMaxBlockRows * stride_s);
    m = scratch.add<C>(R * stride_s);
    scratch.allocate(tasks);
  }

  void run(int task) const {
    const int64_t D = params.D, R = params.R;
    const Range range = rows_of(task, tasks, params.M);
    C* const p_block = scratch.get<C>(task, p);
    C* const s_block = scratch.get<C>(task, s);
    C* const minus_m = scratch.get<C>(task, m);
    C* const panels = scratch.get<C>(task, packed);
    const Block<T> block{{panels, R, D}, stride_s, scratch.get<Vec<C>>(task, sums)};
    pack(panels, block.v, static_cast<const C*>(params.v_ptr));
    negated(minus_m, static_cast<const C*>(params.t_ptr), R, stride_s, params.transpose);
    const int64_t step = block_rows(D, sizeof(T));
    for (int64_t m0 = range.begin; m0 < range.end; m0 += step) {
      const int64_t rows = smaller(step, range.end - m0);
      const T* x = static_cast<const T*>(params.x_ptr) + m0 * params.stride_xm;
      T* y = static_cast<T*>(params.y_ptr) + m0 * params.stride_ym;
      dots(p_block, block, x, params.stride_xm, rows);
      if (params.p_ptr != nullptr)
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(static_cast<C*>(params.p_ptr) + (m0 + i) * R, p_block + i * stride_s,
                      static_cast<size_t>(R) * sizeof(C));
      small_product(s_block, p_block, minus_m, rows, R, stride_s);
      for (int64_t first = 0; first < block.v.vecs(); first += kChunkVecs)
        apply(y, params.stride_ym, x, params.stride_xm, s_block, block, rows, first,
              smaller(block.v.vecs(), first + kChunkVecs), static_cast<const T*>(nullptr), 0);
    }
  }
};

template <class T>
struct Backward {
  using C = Accumulator<T>;
  const ReflectBwdParams& params;
  int tasks;
  bool wants_dx, wants_dv, wants_dt;
  int64_t stride_s, stride_dv, packed, sums, p, q, a, b, m, m_flipped, dv, dm;
  Scratch scratch;

  Backward(const ReflectBwdParams& params, int num_threads)
      : params(params),
        wants_dx(params.dx_ptr != nullptr),
        wants_dv(params.dv_ptr != nullptr),
        wants_dt(params.dt_ptr != nullptr) {
    const int64_t D = params.D, R = params.R;
    const Packed<C> shape{nullptr, R, D};
    tasks = count_tasks(params.M, D, R, num_threads);
    stride_s = round_up(R, larger(kGroup, kLanes<C>));
    // an odd number of cache lines: the rows of a tile of dv do not compete for the same cache sets
    stride_dv = shape.vecs() * kLanes<C>;
    if (stride_dv * sizeof(C) / 64 % 2 == 0) stride_dv += 64 / sizeof(C);
    packed = scratch.add<C>(shape.size());
    sums = scratch.add<Vec<C>>(round_up(R, kGroup) * kMaxBlockRows);
    p = scratch.add<C>(kMaxBlockRows * stride_s);
    q = scratch.add<C>(kMaxBlockRows * stride_s);
    a = scratch.add<C>(kMaxBlockRows * stride_s);
    b = scratch.add<C>(kMaxBlockRows * stride_s);
    m = scratch.add<C>(R * stride_s);
    m_flipped = scratch.add<C>(R * stride_s);
    dv = scratch.add<C>(wants_dv ? round_up(R, kGroup) * stride_dv : 0);
    dm = scratch.add<C>(round_up(R, kGroup) * stride_s);
    scratch.allocate(tasks);
  }

  void run(int task) const {
    const int64_t D = params.D, R = params.R;
    const Range range = rows_of(task, tasks, params.M);
    C* const p_block = scratch.get<C>(task, p);
    C* const q_block = scratch.get<C>(task, q);
    C* const a_block = scratch.get<C>(task, a);
    C* const b_block = scratch.get<C>(task, b);
    C* const minus_m = scratch.get<C>(task, m);
    C* const minus_m_flipped = scratch.get<C>(task, m_flipped);
    C* const dv_sum = scratch.get<C>(task, dv);
    C* const dm_sum = scratch.get<C>(task, dm);
    C* const panels = scratch.get<C>(task, packed);
    const Block<T> block{{panels, R, D}, stride_s, scratch.get<Vec<C>>(task, sums)};
    pack(panels, block.v, static_cast<const C*>(params.v_ptr));
    negated(minus_m, static_cast<const C*>(params.t_ptr), R, stride_s, params.transpose);
    negated(minus_m_flipped, static_cast<const C*>(params.t_ptr), R, stride_s, !params.transpose);
    if (wants_dv) std::memset(dv_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_dv) * sizeof(C));
    std::memset(dm_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_s) * sizeof(C));
    std::memset(p_block, 0, static_cast<size_t>(kMaxBlockRows * stride_s) * sizeof(C));
    const int64_t step = block_rows(D, sizeof(T));
    for (int64_t m0 = range.begin; m0 < range.end; m0 += step) {
      const int64_t rows = smaller(step, range.end - m0);
      const T* dy = static_cast<const T*>(params.dy_ptr) + m0 * params.stride_dym;
      const T* x = wants_dv ? static_cast<const T*>(params.x_ptr) + m0 * params.stride_xm : nullptr;
      T* dx = wants_dx ? static_cast<T*>(params.dx_ptr) + m0 * params.stride_dxm : nullptr;
      dots(q_block, block, dy, params.stride_dym, rows);
      small_product(b_block, q_block, minus_m_flipped, rows, R, stride_s);
      if (wants_dv || wants_dt) {
        const C* from = static_cast<const C*>(params.p_ptr) + m0 * R;
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(p_block + i * stride_s, from + i * R, static_cast<size_t>(R) * sizeof(C));
        small_product(a_block, p_block, minus_m, rows, R, stride_s);
      }
      if (wants_dt) {
        const Outer<C, C> o{dm_sum,  stride_s, false, p_block,  q_block, stride_s,
                            nullptr, nullptr,  0,     stride_s, rows,    stride_s / kLanes<C>,
                            0};
        outer<C, false>(o, block.v, 0, stride_s / kLanes<C>);
      }
      for (int64_t first = 0; first < block.v.vecs(); first += kChunkVecs) {
        const int64_t last = smaller(block.v.vecs(), first + kChunkVecs);
        // x is met for the first time in dv's tiles, three vectors of a row at a time, which no hardware prefetcher
        // follows: fetched while dx is written, the backward takes 0.83 to 0.88 of the time without
        if (wants_dx)
          apply(dx, params.stride_dxm, dy, params.stride_dym, b_block, block, rows, first, last, x, params.stride_xm);
        if (wants_dv) {
          const Outer<T, C> o{dv_sum, stride_dv,        false,    a_block, dy,           params.stride_dym, b_block,
                              x,      params.stride_xm, stride_s, rows,    block.full(), block.tail()};
          outer<T, true>(o, block.v, first, last);
        }
      }
    }
  }

  // dv of a slice of D, summed over the tasks in their order.
  void reduce_dv(int slice, int slices) const {
    const int64_t D = params.D, begin = D * slice / slices, end = D * (slice + 1) / slices;
    for (int64_t r = 0; r < params.R; ++r) {
      C* out = static_cast<C*>(params.dv_ptr) + r * D;
      const C* part = scratch.get<C>(0, dv) + r * stride_dv;
      std::memcpy(out + begin, part + begin, static_cast<size_t>(end - begin) * sizeof(C));
      for (int task = 1; task < tasks; ++task) {
        part = scratch.get<C>(task, dv) + r * stride_dv;
        for (int64_t d = begin; d < end; ++d) out[d] += part[d];
      }
    }
  }

  void reduce_dt() const {
    const int64_t R = params.R;
    C* out = static_cast<C*>(params.dt_ptr);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) {
        C sum = 0;
        for (int task = 0; task < tasks; ++task) sum -= scratch.get<C>(task, dm)[i * stride_s + j];
        out[params.transpose ? j * R + i : i * R + j] = sum;
      }
  }
};

template <class T>
void forward(const ReflectFwdParams& params, int num_threads) {
  const Forward<T> call(params, num_threads);
  run_tasks(
      call.tasks, num_threads, [](int task, void* context) { static_cast<const Forward<T>*>(context)->run(task); },
      const_cast<Forward<T>*>(&call));
}

template <class T>
void backward(const ReflectBwdParams& params, int num_threads) {
  const Backward<T> call(params, num_threads);
  void* const context = const_cast<Backward<T>*>(&call);
  run_tasks(
      call.tasks, num_threads, [](int task, void* context) { static_cast<const Backward<T>*>(context)->run(task); },
      context);
  if (call.wants_dt) call.reduce_dt();
  if (!call.wants_dv) return;
  if (call.tasks * params.R * params.D < kParallelWork)
    call.reduce_dv(0, 1);
  else
    run_tasks(
        call.tasks, num_threads,
        [](int task, void* context) {
          const auto* call = static_cast<const Backward<T>*>(context);
          call->reduce_dv(task, call->tasks);
        },
        context);
}

}  // namespace

void reflect_fwd(const ReflectFwdParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return forward<float>(params, num_threads);
    case DType::kFloat64:
      return forward<double>(params, num_threads);
    case DType::kBFloat16:
      return forward<BFloat16>(params, num_threads);
    case DType::kFloat16:
      return forward<Float16>(params, num_threads);
  }
}

void reflect_bwd(const ReflectBwdParams& params, int num_threads) {
  switch (params.dtype) {
    case DType::kFloat32:
      return backward<float>(params, num_threads);
    case DType::kFloat64:
      return backward<double>(params, num_threads);
    case DType::kBFloat16:
      return backward<BFloat16>(params, num_threads);
    case DType::kFloat16:
      return backward<Float16>(params, num_threads);
  }
}

}  // namespace hra::cpu::HRA_ISA
