// The gradient of the weight side, y = x (W Q)ᵀ (hra_kernels/reference.py: weight_side_bwd), in one pass over x and dx:
//
//   p = x vᵀ,  q = dx vᵀ,  E = sum over rows of pᵀ dx,  F = the same of qᵀ x,  c = pᵀ q
//   dv = -(t E - t c tᵀ v + tᵀ k F),  dt = -k cᵀ,  k = I - g t,  g = v vᵀ
//
// A block of rows stays in L2 between its products and its sums, so memory sees 2 M D elements and nothing of that size
// is written. Tasks and their sums are as in reflect.cpp: the result depends on the number of tasks and nothing else.
#include "blocks.h"
#include "scratch.h"

namespace hra::cpu::HRA_ISA {
namespace {

// out (R, stride) = in (R, R) with rows `from` apart, or its transpose, zero beyond R.
template <class C>
void padded(C* out, const C* in, int64_t from, int64_t R, int64_t stride, bool flip) {
  for (int64_t i = 0; i < R; ++i) {
    for (int64_t j = 0; j < R; ++j) out[i * stride + j] = flip ? in[j * from + i] : in[i * from + j];
    for (int64_t j = R; j < stride; ++j) out[i * stride + j] = 0;
  }
}

template <class T>
struct WeightSide {
  using C = Accumulator<T>;
  const WeightSideBwdParams& params;
  int tasks;
  int64_t stride_s;  // of every matrix whose rows are R long
  int64_t stride_d;  // of E and F
  int64_t packed, sums, p, q, c, e, f, part;
  int64_t from_e, from_f, from_v;  // (R, R) row i: what row i of E, F and v adds to each row of dv
  Scratch own, shared;

  WeightSide(const WeightSideBwdParams& params, int num_threads) : params(params) {
    const int64_t D = params.D, R = params.R;
    const Packed<C> shape{nullptr, R, D};
    tasks = count_tasks(params.M, D, R, num_threads);
    stride_s = round_up(R, larger(kGroup, kLanes<C>));
    stride_d = odd_lines<C>(shape.vecs());
    packed = own.add<C>(shape.size());
    sums = own.add<Vec<C>>(round_up(R, kGroup) * kMaxBlockRows);
    p = own.add<C>(kMaxBlockRows * stride_s);
    q = own.add<C>(kMaxBlockRows * stride_s);
    c = own.add<C>(round_up(R, kGroup) * stride_s);
    e = own.add<C>(round_up(R, kGroup) * stride_d);
    f = own.add<C>(round_up(R, kGroup) * stride_d);
    part = own.add<C>(round_up(R, kGroup) * odd_lines<C>(kChunkVecs));
    own.allocate(tasks);
    from_e = shared.add<C>(R * stride_s);
    from_f = shared.add<C>(R * stride_s);
    from_v = shared.add<C>(R * stride_s);
    shared.allocate(1);
  }

  Block<T> block_of(int task) const {
    return {{own.get<C>(task, packed), params.R, params.D}, stride_s, own.get<Vec<C>>(task, sums)};
  }

  void run(int task) const {
    const int64_t D = params.D, R = params.R;
    const Range range = rows_of(task, tasks, params.M);
    C* const p_block = own.get<C>(task, p);
    C* const q_block = own.get<C>(task, q);
    C* const c_sum = own.get<C>(task, c);
    C* const e_sum = own.get<C>(task, e);
    C* const f_sum = own.get<C>(task, f);
    const Block<T> block = block_of(task);
    pack(own.get<C>(task, packed), block.v, static_cast<const C*>(params.v_ptr));
    std::memset(p_block, 0, static_cast<size_t>(kMaxBlockRows * stride_s) * sizeof(C));
    std::memset(q_block, 0, static_cast<size_t>(kMaxBlockRows * stride_s) * sizeof(C));
    std::memset(c_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_s) * sizeof(C));
    std::memset(e_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_d) * sizeof(C));
    std::memset(f_sum, 0, static_cast<size_t>(round_up(R, kGroup) * stride_d) * sizeof(C));
    const int64_t step = block_rows(D, sizeof(T));
    for (int64_t m0 = range.begin; m0 < range.end; m0 += step) {
      const int64_t rows = smaller(step, range.end - m0);
      const T* x = static_cast<const T*>(params.x_ptr) + m0 * params.stride_xm;
      const T* dx = static_cast<const T*>(params.dx_ptr) + m0 * params.stride_dxm;
      dots(p_block, block, x, params.stride_xm, rows);
      dots(q_block, block, dx, params.stride_dxm, rows);
      const int64_t vecs_s = stride_s / kLanes<C>, full = block.full();
      outer<C, false>(Outer<C, C>::one(c_sum, stride_s, false, p_block, q_block, stride_s, stride_s, rows, vecs_s, 0),
                      block.v, 0, vecs_s);
      for (int64_t first = 0; first < block.v.vecs(); first += kChunkVecs) {
        const int64_t last = smaller(block.v.vecs(), first + kChunkVecs);
        outer<T, false>(Outer<T, C>::one(e_sum, stride_d, false, p_block, dx, params.stride_dxm, stride_s, rows, full,
                                         block.tail()),
                        block.v, first, last);
        outer<T, false>(
            Outer<T, C>::one(f_sum, stride_d, false, q_block, x, params.stride_xm, stride_s, rows, full, block.tail()),
            block.v, first, last);
      }
    }
  }

  // dt and what dv is combined with, from c and g: all of it R x R.
  void combine_small() const {
    const int64_t R = params.R, square = R * stride_s;
    const Block<C> block{{own.get<C>(0, packed), R, params.D}, stride_s, own.get<Vec<C>>(0, sums)};
    Scratch local;
    int64_t at[6];
    for (int64_t& offset : at) offset = local.add<C>(square);
    local.allocate(1);
    C* const t = local.get<C>(0, at[0]);
    C* const t_flipped = local.get<C>(0, at[1]);
    C* const c_flipped = local.get<C>(0, at[2]);
    C* const g = local.get<C>(0, at[3]);
    C* const gt = local.get<C>(0, at[4]);
    C* const scratch = local.get<C>(0, at[5]);
    C* const sum = own.get<C>(0, c);
    for (int task = 1; task < tasks; ++task)
      for (int64_t i = 0; i < square; ++i) sum[i] += own.get<C>(task, c)[i];
    padded(c_flipped, sum, stride_s, R, stride_s, true);
    padded(t, static_cast<const C*>(params.t_ptr), R, R, stride_s, false);
    padded(t_flipped, static_cast<const C*>(params.t_ptr), R, R, stride_s, true);
    const C* v = static_cast<const C*>(params.v_ptr);
    for (int64_t r = 0; r < R; r += kMaxBlockRows)
      dots(g + r * stride_s, block, v + r * params.D, params.D, smaller(kMaxBlockRows, R - r));
    product(gt, stride_s, true, g, stride_s, t, stride_s, R, R, stride_s);
    product(scratch, stride_s, true, gt, stride_s, c_flipped, stride_s, R, R, stride_s);
    C* const dt = static_cast<C*>(params.dt_ptr);
    for (int64_t i = 0; i < R; ++i)
      for (int64_t j = 0; j < R; ++j) dt[i * R + j] = scratch[i * stride_s + j] - c_flipped[i * stride_s + j];
    for (int64_t i = 0; i < square; ++i) shared.get<C>(0, from_e)[i] = -t_flipped[i];
    padded(g, gt, stride_s, R, stride_s, true);
    product(shared.get<C>(0, from_f), stride_s, true, g, stride_s, t, stride_s, R, R, stride_s);  // -kᵀ t
    for (int64_t i = 0; i < square; ++i) shared.get<C>(0, from_f)[i] -= t[i];
    product(scratch, stride_s, true, t, stride_s, c_flipped, stride_s, R, R, stride_s);
    product(shared.get<C>(0, from_v), stride_s, true, scratch, stride_s, t_flipped, stride_s, R, R,
            stride_s);  // t cᵀ tᵀ
  }

  // dv of a slice of D; E and F are summed over the tasks in their order.
  void combine(int slice, int slices) const {
    const int64_t offsets[] = {e, f};
    const int64_t D = params.D, R = params.R;
    const Block<T> block = block_of(0);
    const int64_t vecs = block.v.vecs(), begin = vecs * slice / slices, end = vecs * (slice + 1) / slices;
    const int64_t stride_part = odd_lines<C>(kChunkVecs);
    C* const out = own.get<C>(slice, part);
    for (int64_t first = begin; first < end; first += kChunkVecs) {
      const int64_t last = smaller(end, first + kChunkVecs), d0 = first * kLanes<C>;
      const int64_t count = smaller(last * kLanes<C>, D) - d0;
      for (const int64_t offset : offsets)
        for (int task = 1; task < tasks; ++task)
          for (int64_t r = 0; r < R; ++r) {
            C* to = own.get<C>(0, offset) + r * stride_d + d0;
            const C* from = own.get<C>(task, offset) + r * stride_d + d0;
            for (int64_t d = 0; d < count; ++d) to[d] += from[d];
          }
      const int64_t whole = last - first, full = smaller(last, block.full()) - first;
      const Outer<C, C> both{out,
                             stride_part,
                             true,
                             shared.get<C>(0, from_e),
                             own.get<C>(0, e) + d0,
                             stride_d,
                             shared.get<C>(0, from_f),
                             own.get<C>(0, f) + d0,
                             stride_d,
                             stride_s,
                             R,
                             whole,
                             0};
      outer<C, true>(both, block.v, 0, whole);
      outer<C, false>(Outer<C, C>::one(out, stride_part, false, shared.get<C>(0, from_v),
                                       static_cast<const C*>(params.v_ptr) + d0, D, stride_s, R, full, block.tail()),
                      block.v, 0, whole);
      for (int64_t r = 0; r < R; ++r)
        std::memcpy(static_cast<C*>(params.dv_ptr) + r * D + d0, out + r * stride_part,
                    static_cast<size_t>(count) * sizeof(C));
    }
  }
};

template <class T>
void backward(const WeightSideBwdParams& params, int num_threads) {
  const WeightSide<T> call(params, num_threads);
  run_each(call.tasks, num_threads, [&](int task) { call.run(task); });
  call.combine_small();
  if (3 * params.R * params.R * params.D < kParallelWork) return call.combine(0, 1);
  run_each(call.tasks, num_threads, [&](int task) { call.combine(task, call.tasks); });
}

}  // namespace

void weight_side_bwd(const WeightSideBwdParams& params, int num_threads) {
  with_type(params.dtype, [&](auto type) { backward<typename decltype(type)::T>(params, num_threads); });
}

}  // namespace hra::cpu::HRA_ISA
