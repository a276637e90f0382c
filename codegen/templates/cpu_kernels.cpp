// The cpu target's kernels as torch ops: llmopt::linear_cpp, llmopt::attend_cpp, llmopt::kv_write_.
//
// Shapes and meaning are those of the ops in compiler/ops; here is only argument checking and the choice of a type.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <torch/library.h>

#include <vector>

#include "cpu_attend.h"
#include "cpu_linear.h"

namespace llmopt {
namespace {

using at::Tensor;

constexpr int64_t FEW_ROWS = 16;

template <typename Fn>
void for_float_type(at::ScalarType type, const char* op, Fn fn) {
  switch (type) {
    case at::kFloat: return fn(float{});
    case at::kBFloat16: return fn(c10::BFloat16{});
    case at::kHalf: return fn(c10::Half{});
    default: TORCH_CHECK(false, op, ": dtype ", type, " is not one of float32, bfloat16, float16");
  }
}

template <typename T>
void run_linear(const Tensor& x, const Tensor& weight, const Tensor* bias, Tensor& y) {
  LinearArgs<T> a;
  a.M = x.size(0), a.K = x.size(1), a.N = weight.size(0);
  std::vector<float> wide;
  if constexpr (std::is_same_v<T, float>) {
    a.x = x.const_data_ptr<float>(), a.stride = x.stride(0);
  } else {
    wide.resize(a.M * a.K);
    for (int64_t m = 0; m < a.M; ++m) widen(wide.data() + m * a.K, x.const_data_ptr<T>() + m * x.stride(0), a.K);
    a.x = wide.data(), a.stride = a.K;
  }
  a.weight = weight.const_data_ptr<T>();
  a.bias = bias ? bias->const_data_ptr<T>() : nullptr;
  a.y = y.mutable_data_ptr<T>();
  linear_few(a);
}

Tensor linear_cpp(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias) {
  TORCH_CHECK(weight.dim() == 2 && x.dim() >= 1 && x.size(-1) == weight.size(1), "linear_cpp: x ", x.sizes(),
              " does not fit weight ", weight.sizes());
  int64_t K = weight.size(1), rows = K ? x.numel() / K : 0;
  bool plain = x.scalar_type() != at::kDouble && weight.is_contiguous() && (!bias || bias->is_contiguous());
  if (rows == 0 || rows > FEW_ROWS || !plain) return at::linear(x, weight, bias);
  TORCH_CHECK(x.scalar_type() == weight.scalar_type() && (!bias || bias->scalar_type() == x.scalar_type()),
              "linear_cpp: x is ", x.scalar_type(), ", weight is ", weight.scalar_type(), "; give both one dtype");
  Tensor flat = x.reshape({rows, K});
  if (flat.stride(1) != 1) flat = flat.contiguous();
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = weight.size(0);
  Tensor y = at::empty(shape, x.options());
  for_float_type(x.scalar_type(), "linear_cpp", [&](auto t) {
    run_linear<decltype(t)>(flat, weight, bias ? &*bias : nullptr, y);
  });
  return y;
}

void check_indices(const Tensor& block_tables, const Tensor& seq_ids, const Tensor& positions, int64_t pages,
                   int64_t page) {
  const int64_t* tables = block_tables.const_data_ptr<int64_t>();
  int64_t S = block_tables.size(0), width = block_tables.size(1);
  for (int64_t n = 0; n < seq_ids.numel(); ++n) {
    int64_t seq = seq_ids.const_data_ptr<int64_t>()[n], at = positions.const_data_ptr<int64_t>()[n];
    TORCH_CHECK(seq >= 0 && seq < S, "attend_cpp: seq_ids[", n, "] = ", seq, ", but block_tables has ", S, " rows");
    TORCH_CHECK(at >= 0 && at / page < width, "attend_cpp: position ", at, " of token ", n, " lies outside the ",
                width, " pages of ", page, " of its block table");
  }
  for (int64_t i = 0; i < S * width; ++i) {
    TORCH_CHECK(tables[i] >= 0 && tables[i] < pages, "attend_cpp: block_tables names page ", tables[i], " of ", pages);
  }
}

Tensor attend_cpp(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const Tensor& block_tables,
                  const Tensor& seq_ids, const Tensor& positions, const std::optional<Tensor>& sinks, double scale,
                  int64_t window, double softcap) {
  TORCH_CHECK(q_in.dim() == 4 && q_in.size(0) == 1 && k_in.dim() == 4 && v_in.dim() == 4,
              "attend_cpp: q ", q_in.sizes(), ", k_pages ", k_in.sizes(), ", v_pages ", v_in.sizes(),
              "; wanted q [1, Hq, N, D] and pages [P, Hkv, page, D]");
  TORCH_CHECK(q_in.scalar_type() == k_in.scalar_type() && q_in.scalar_type() == v_in.scalar_type(),
              "attend_cpp: q, k_pages and v_pages differ in dtype");
  int64_t Hq = q_in.size(1), N = q_in.size(2), Hkv = k_in.size(1);
  TORCH_CHECK(Hkv > 0 && Hq % Hkv == 0 && v_in.size(1) == Hkv && q_in.size(3) == k_in.size(3) &&
                  v_in.size(2) == k_in.size(2) && v_in.size(0) == k_in.size(0),
              "attend_cpp: heads or widths do not fit: q ", q_in.sizes(), ", k_pages ", k_in.sizes(), ", v_pages ",
              v_in.sizes());
  TORCH_CHECK(seq_ids.numel() == N && positions.numel() == N && block_tables.dim() == 2,
              "attend_cpp: seq_ids ", seq_ids.sizes(), " and positions ", positions.sizes(), " must hold ", N,
              " values, block_tables ", block_tables.sizes(), " two axes");
  auto rows_contiguous = [](const Tensor& t) { return t.stride(3) == 1 ? t : t.contiguous(); };
  Tensor q = rows_contiguous(q_in), k = rows_contiguous(k_in), v = rows_contiguous(v_in);
  Tensor tables = block_tables.contiguous(), seqs = seq_ids.contiguous(), at_ = positions.contiguous();
  check_indices(tables, seqs, at_, k.size(0), k.size(2));
  Tensor wide_sinks = sinks ? sinks->to(at::kFloat).contiguous() : Tensor();
  int64_t Dv = v.size(3);
  Tensor out = at::empty({1, N, Hq, Dv}, q.options());
  for_float_type(q.scalar_type(), "attend_cpp", [&](auto t) {
    using T = decltype(t);
    AttendArgs<T> a{};
    a.q = q.const_data_ptr<T>(), a.k_pages = k.const_data_ptr<T>(), a.v_pages = v.const_data_ptr<T>();
    a.out = out.mutable_data_ptr<T>();
    a.q_head = q.stride(1), a.q_token = q.stride(2);
    a.k_page = k.stride(0), a.k_head = k.stride(1), a.k_slot = k.stride(2);
    a.v_page = v.stride(0), a.v_head = v.stride(1), a.v_slot = v.stride(2);
    a.tables = tables.const_data_ptr<int64_t>(), a.seq_ids = seqs.const_data_ptr<int64_t>();
    a.positions = at_.const_data_ptr<int64_t>();
    a.sinks = sinks ? wide_sinks.const_data_ptr<float>() : nullptr;
    a.N = N, a.Hq = Hq, a.Hkv = Hkv, a.D = q.size(3), a.Dv = Dv;
    a.page = k.size(2), a.table_width = tables.size(1);
    a.scale = static_cast<float>(scale), a.softcap = static_cast<float>(softcap), a.window = window;
    attend_all(a);
  });
  return out.transpose(1, 2);
}

void kv_write_(const Tensor& pages, const Tensor& x, const Tensor& slots_in) {
  TORCH_CHECK(pages.dim() == 4 && x.dim() == 4 && x.size(0) == 1 && x.size(1) == pages.size(1) &&
                  x.size(3) == pages.size(3) && slots_in.numel() == x.size(2),
              "kv_write_: x ", x.sizes(), " and slots ", slots_in.sizes(), " do not fit pages ", pages.sizes());
  TORCH_CHECK(pages.scalar_type() == x.scalar_type() && pages.stride(3) == 1, "kv_write_: x is ", x.scalar_type(),
              ", pages are ", pages.scalar_type(), " with rows ", pages.stride(3), " apart");
  Tensor rows = x.stride(3) == 1 ? x : x.contiguous(), slots = slots_in.contiguous();
  int64_t size = pages.size(2), all = pages.size(0) * size, bytes = x.size(3) * x.element_size();
  char* to = static_cast<char*>(pages.mutable_data_ptr());
  const char* from = static_cast<const char*>(rows.const_data_ptr());
  for (int64_t n = 0; n < x.size(2); ++n) {
    int64_t slot = slots.const_data_ptr<int64_t>()[n];
    TORCH_CHECK(slot >= 0 && slot < all, "kv_write_: slot ", slot, " of token ", n, " lies outside ", all, " slots");
    for (int64_t h = 0; h < x.size(1); ++h) {
      int64_t target = slot / size * pages.stride(0) + h * pages.stride(1) + slot % size * pages.stride(2);
      int64_t source = h * rows.stride(1) + n * rows.stride(2);
      std::memcpy(to + target * x.element_size(), from + source * x.element_size(), bytes);
    }
  }
}

}  // namespace
}  // namespace llmopt

// the schemas stand in codegen/cpp.py
TORCH_LIBRARY_IMPL(llmopt, CPU, m) {
  m.impl("linear_cpp", llmopt::linear_cpp);
  m.impl("attend_cpp", llmopt::attend_cpp);
  m.impl("kv_write_", llmopt::kv_write_);
}
