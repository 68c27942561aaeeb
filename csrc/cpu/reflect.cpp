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
#include "blocks.h"
#include "scratch.h"

namespace hra::cpu::HRA_ISA {
namespace {

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
      product(s_block, stride_s, true, p_block, stride_s, minus_m, stride_s, rows, R, stride_s);
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
  bool dv_in_place;  // a single task sums dv in dv_ptr, if its tiles write nothing beyond R and D
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
    dv_in_place = tasks == 1 && params.M > 0 && D % kLanes<C> == 0 && R % kGroup == tile_rows(R % kGroup) % kGroup;
    stride_dv = dv_in_place ? D : odd_lines<C>(shape.vecs());
    packed = scratch.add<C>(shape.size());
    sums = scratch.add<Vec<C>>(round_up(R, kGroup) * kMaxBlockRows);
    p = scratch.add<C>(kMaxBlockRows * stride_s);
    q = scratch.add<C>(kMaxBlockRows * stride_s);
    a = scratch.add<C>(kMaxBlockRows * stride_s);
    b = scratch.add<C>(kMaxBlockRows * stride_s);
    m = scratch.add<C>(R * stride_s);
    m_flipped = scratch.add<C>(R * stride_s);
    dv = scratch.add<C>(wants_dv && !dv_in_place ? round_up(R, kGroup) * stride_dv : 0);
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
    C* const dv_sum = dv_in_place ? static_cast<C*>(params.dv_ptr) : scratch.get<C>(task, dv);
    C* const dm_sum = scratch.get<C>(task, dm);
    C* const panels = scratch.get<C>(task, packed);
    const Block<T> block{{panels, R, D}, stride_s, scratch.get<Vec<C>>(task, sums)};
    pack(panels, block.v, static_cast<const C*>(params.v_ptr));
    negated(minus_m, static_cast<const C*>(params.t_ptr), R, stride_s, params.transpose);
    negated(minus_m_flipped, static_cast<const C*>(params.t_ptr), R, stride_s, !params.transpose);
    if (wants_dv && range.begin == range.end)  // else the first block of rows writes it
      std::memset(dv_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_dv) * sizeof(C));
    std::memset(dm_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_s) * sizeof(C));
    std::memset(p_block, 0, static_cast<size_t>(kMaxBlockRows * stride_s) * sizeof(C));
    const int64_t step = block_rows(D, sizeof(T));
    for (int64_t m0 = range.begin; m0 < range.end; m0 += step) {
      const int64_t rows = smaller(step, range.end - m0);
      const T* dy = static_cast<const T*>(params.dy_ptr) + m0 * params.stride_dym;
      const T* x = wants_dv ? static_cast<const T*>(params.x_ptr) + m0 * params.stride_xm : nullptr;
      T* dx = wants_dx ? static_cast<T*>(params.dx_ptr) + m0 * params.stride_dxm : nullptr;
      dots(q_block, block, dy, params.stride_dym, rows);
      product(b_block, stride_s, true, q_block, stride_s, minus_m_flipped, stride_s, rows, R, stride_s);
      if (wants_dv || wants_dt) {
        const C* from = static_cast<const C*>(params.p_ptr) + m0 * R;
        for (int64_t i = 0; i < rows; ++i)
          std::memcpy(p_block + i * stride_s, from + i * R, static_cast<size_t>(R) * sizeof(C));
        product(a_block, stride_s, true, p_block, stride_s, minus_m, stride_s, rows, R, stride_s);
      }
      if (wants_dt) {
        const int64_t vecs = stride_s / kLanes<C>;
        outer<C, false>(Outer<C, C>::one(dm_sum, stride_s, false, p_block, q_block, stride_s, stride_s, rows, vecs, 0),
                        block.v, 0, vecs);
      }
      for (int64_t first = 0; first < block.v.vecs(); first += kChunkVecs) {
        const int64_t last = smaller(block.v.vecs(), first + kChunkVecs);
        // x is met for the first time in dv's tiles, three vectors of a row at a time, which no hardware prefetcher
        // follows: fetched while dx is written, the backward takes 0.83 to 0.88 of the time without
        if (wants_dx)
          apply(dx, params.stride_dxm, dy, params.stride_dym, b_block, block, rows, first, last, x, params.stride_xm);
        if (wants_dv) {
          const Outer<T, C> o{dv_sum,      stride_dv, m0 == range.begin, a_block,  dy,   params.stride_dym,
                              b_block,     x,         params.stride_xm,  stride_s, rows, block.full(),
                              block.tail()};
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
  run_each(call.tasks, num_threads, [&](int task) { call.run(task); });
}

template <class T>
void backward(const ReflectBwdParams& params, int num_threads) {
  const Backward<T> call(params, num_threads);
  run_each(call.tasks, num_threads, [&](int task) { call.run(task); });
  if (call.wants_dt) call.reduce_dt();
  if (!call.wants_dv || call.dv_in_place) return;
  if (call.tasks * params.R * params.D < kParallelWork)
    call.reduce_dv(0, 1);
  else
    run_each(call.tasks, num_threads, [&](int task) { call.reduce_dv(task, call.tasks); });
}

}  // namespace

void reflect_fwd(const ReflectFwdParams& params, int num_threads) {
  with_type(params.dtype, [&](auto type) { forward<typename decltype(type)::T>(params, num_threads); });
}

void reflect_bwd(const ReflectBwdParams& params, int num_threads) {
  with_type(params.dtype, [&](auto type) { backward<typename decltype(type)::T>(params, num_threads); });
}

}  // namespace hra::cpu::HRA_ISA
