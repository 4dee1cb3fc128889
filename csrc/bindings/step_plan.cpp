// Optimizer steps by a plan: reads parameters and gradients of Python without a torch op.
//
// Per tensor this takes some 20 ns, through the exchange functions of DLPack, which every version
// of torch that has them offers in the same form. Nothing is remembered of gradients; of parameters
// only what they must still be. The library of ops that made the plan does the rest.
// SPDX-License-Identifier: MIT
#include "bindings/step_plan.h"

#include <dlfcn.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <optional>
#include <set>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "bindings/dlpack.h"
#include "bitsandbytes/kernels/step_plan.h"

namespace py = pybind11;

namespace bnb {
namespace {

// A loaded library of ops. It stays loaded: torch cannot let go of ops either.
class OpsLibrary {
 public:
  explicit OpsLibrary(const std::string& path) {
    void* handle = dlopen(path.c_str(), RTLD_NOW | RTLD_NOLOAD);
    if (handle == nullptr) throw std::runtime_error("StepPlan: " + path + " is not loaded");
    take = reinterpret_cast<TakePlannedStep>(dlsym(handle, kTakePlannedStep));
    drop = reinterpret_cast<DropStepPlan>(dlsym(handle, kDropStepPlan));
    if (take == nullptr || drop == nullptr) {
      throw std::runtime_error("StepPlan: " + path + " holds no plans");
    }
  }

  TakePlannedStep take;
  DropStepPlan drop;
};

// A plan that a library holds, until this is gone.
struct HeldPlan {
  OpsLibrary library;
  int64_t number;

  HeldPlan(const std::string& path, int64_t plan) : library(path), number(plan) {}
  ~HeldPlan() { library.drop(number); }
  HeldPlan(const HeldPlan&) = delete;
  HeldPlan& operator=(const HeldPlan&) = delete;
};

// Describes tensors of torch.
class TensorReader {
 public:
  // `tensor_class`: torch.Tensor.
  explicit TensorReader(const py::type& tensor_class) : class_(tensor_class) {
    const py::object capsule = tensor_class.attr("__dlpack_c_exchange_api__");
    auto* api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApiCapsule));
    if (api == nullptr) throw py::error_already_set();
    while (api != nullptr && api->major != dlpack::kExchangeApiMajor) api = api->previous;
    if (api == nullptr || api->describe == nullptr) {
      throw std::runtime_error("StepPlan: this torch describes no tensors");
    }
    describe_ = api->describe;
  }

  bool is_tensor(PyObject* object) const {
    return Py_TYPE(object) == reinterpret_cast<PyTypeObject*>(class_.ptr());
  }

  // Returns false where the object is no tensor with plain memory.
  bool read(PyObject* object, dlpack::Tensor& out) const {
    if (describe_(object, &out) != 0) {
      PyErr_Clear();
      return false;
    }
    if (out.data == nullptr && numel(out) > 0) return false;  // which the op has a sentence for
    out.data = static_cast<char*>(out.data) + out.byte_offset;
    // Views that stand for the negative of their memory have gaps, as they are imaginary parts of
    // complex numbers, except where they hold one number.
    return numel(out) != 1 || !is_negated(object);
  }

  static int64_t numel(const dlpack::Tensor& t) {
    int64_t n = 1;
    for (int32_t d = 0; d < t.ndim; ++d) n *= t.shape[d];
    return n;
  }

 private:
  static bool is_negated(PyObject* object) {
    static PyObject* const name = PyUnicode_InternFromString("is_neg");
    PyObject* answer = PyObject_CallMethodNoArgs(object, name);
    if (answer == nullptr) PyErr_Clear();
    const bool negated = answer != Py_False;
    Py_XDECREF(answer);
    return negated;
  }

  py::type class_;
  int (*describe_)(void*, dlpack::Tensor*);
};

bool same_dtype_and_device(const dlpack::Tensor& a, const dlpack::Tensor& b) {
  return a.dtype_code == b.dtype_code && a.dtype_bits == b.dtype_bits &&
         a.dtype_lanes == b.dtype_lanes && a.device_type == b.device_type &&
         a.device_id == b.device_id;
}

// What a parameter was when the plan was made, but for its place: parameters may share it.
class Layout {
 public:
  Layout(const dlpack::Tensor& t) : known_(t), extents_(t.shape, t.shape + t.ndim) {
    extents_.insert(extents_.end(), t.strides, t.strides + t.ndim);
  }

  // Whether `t` has the dtype, device, shape and strides of the parameter.
  bool fits(const dlpack::Tensor& t) const {
    if (!same_dtype_and_device(t, known_) || t.ndim != known_.ndim) return false;
    const int64_t* shape = extents_.data();
    const int64_t* strides = shape + t.ndim;
    for (int32_t d = 0; d < t.ndim; ++d) {
      if (t.shape[d] != shape[d]) return false;
      if (t.strides[d] != strides[d] && t.shape[d] > 1) return false;
    }
    return true;
  }

  const dlpack::Tensor& known() const { return known_; }  // without shape and strides

  bool operator<(const Layout& other) const {
    const auto key = [](const Layout& l) {
      const dlpack::Tensor& t = l.known_;
      return std::tie(t.dtype_code, t.dtype_bits, t.dtype_lanes, t.device_type, t.device_id,
                      l.extents_);
    };
    return key(*this) < key(other);
  }

 private:
  dlpack::Tensor known_;
  std::vector<int64_t> extents_;
};

std::optional<DType> float_dtype(const dlpack::Tensor& t) {
  if (t.dtype_lanes != 1) return std::nullopt;
  if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 32) return DType::kFloat32;
  if (t.dtype_code == dlpack::kFloat && t.dtype_bits == 16) return DType::kFloat16;
  if (t.dtype_code == dlpack::kBFloat && t.dtype_bits == 16) return DType::kBFloat16;
  return std::nullopt;
}

// Reads the options of a step (`_STEP` in python/bitsandbytes/_ops.py) one after the other.
class Options {
 public:
  Options(PyObject* tuple, const TensorReader& reader, const dlpack::Tensor& first)
      : tuple_(tuple), reader_(reader), first_(first) {}

  // Returns false where the plan does not serve them.
  bool read(PlannedStep& step) {
    step.step = static_cast<int64_t*>(number_on_device(dlpack::kInteger, 64));
    if (step.step == nullptr) return false;
    if (!next_is_none()) {
      const Py_ssize_t at = at_;
      if (const void* single = number_on_device(dlpack::kFloat, 32)) {
        step.lr = static_cast<const float*>(single);
      } else {
        at_ = at;
        const void* wide = number_on_device(dlpack::kFloat, 64);
        if (wide == nullptr) return false;
        step.lr = static_cast<const double*>(wide);
      }
    }
    Hyper& hyper = step.hyper;
    for (double* value : {&hyper.lr, &hyper.beta1, &hyper.beta2, &hyper.beta3, &hyper.alpha,
                          &hyper.eps, &hyper.weight_decay, &hyper.gnorm_scale}) {
      if (!number(*value)) return false;
    }
    hyper.skip_zeros = item(at_++) == Py_True;
    double max_unorm = 0.0;
    for (double* value : {&hyper.t_alpha, &hyper.t_beta3, &max_unorm}) {
      if (!number(*value)) return false;
    }
    if (!(max_unorm >= 0.0)) return false;
    step.max_unorm = static_cast<float>(max_unorm);
    if (!next_is_none()) {
      step.stochastic_rounding = true;
      const int64_t seed = PyLong_AsLongLong(item(at_++));
      if (PyErr_Occurred()) return refuse();
      step.seed = static_cast<uint64_t>(seed);
    }
    if (!per_parameter(step.gnorm_scales, step.count) || !per_parameter(step.unorm, step.count) ||
        !per_parameter(step.update_scales, step.count)) {
      return false;
    }
    if (step.update_scales != nullptr && max_unorm != 0.0) return false;
    return at_ == PyTuple_GET_SIZE(tuple_);
  }

  static constexpr Py_ssize_t kLeast = 15;  // those without one number per parameter

 private:
  PyObject* item(Py_ssize_t i) const { return PyTuple_GET_ITEM(tuple_, i); }

  static bool refuse() {
    PyErr_Clear();
    return false;
  }

  // Steps over None.
  bool next_is_none() {
    const bool none = item(at_) == Py_None;
    at_ += none ? 1 : 0;
    return none;
  }

  bool number(double& value) {
    value = PyFloat_AsDouble(item(at_++));
    return !(value == -1.0 && PyErr_Occurred()) || refuse();
  }

  void* number_on_device(uint8_t code, uint8_t bits) {
    PyObject* object = item(at_++);
    dlpack::Tensor t{};
    const bool fits = reader_.is_tensor(object) && reader_.read(object, t) &&
                      TensorReader::numel(t) == 1 && same_dtype_and_device(t, expected(code, bits));
    return fits ? t.data : nullptr;
  }

  // Reads an option that may be left out: a tensor of `count` floats in a row, or None.
  template <class Pointer>
  bool per_parameter(Pointer& pointer, int64_t count) {
    if (at_ == PyTuple_GET_SIZE(tuple_) || next_is_none()) return true;
    PyObject* object = item(at_++);
    dlpack::Tensor t{};
    const bool fits = reader_.is_tensor(object) && reader_.read(object, t) && t.ndim == 1 &&
                      t.shape[0] == count && (count == 1 || t.strides[0] == 1) &&
                      same_dtype_and_device(t, expected(dlpack::kFloat, 32));
    pointer = fits ? static_cast<Pointer>(t.data) : nullptr;
    return fits;
  }

  // A tensor of that type on the device of the parameters.
  dlpack::Tensor expected(uint8_t code, uint8_t bits) const {
    dlpack::Tensor t = first_;
    t.dtype_code = code;
    t.dtype_bits = bits;
    return t;
  }

  PyObject* tuple_;
  const TensorReader& reader_;
  const dlpack::Tensor& first_;
  Py_ssize_t at_ = 0;
};

class StepPlan {
 public:
  StepPlan(const std::string& library, int64_t number, const py::type& tensor_class,
           const py::tuple& params)
      : held_(library, number), reader_(tensor_class), params_(params) {
    if (params.empty()) throw py::value_error("StepPlan: params must hold at least one tensor");
    for (const py::handle param : params_) {
      dlpack::Tensor t{};
      if (!reader_.read(param.ptr(), t)) {
        throw py::value_error("StepPlan: params must be tensors with memory of their own");
      }
      known_.push_back({Py_TYPE(param.ptr()), &*layouts_.emplace(t).first});
      tensors_.push_back({t.data, nullptr, TensorReader::numel(t)});
    }
    const std::optional<DType> dtype = float_dtype(known_[0].layout->known());
    if (!dtype.has_value()) throw py::value_error("StepPlan: params must be of a float type");
    dtype_ = *dtype;
  }

  bool stale() const { return stale_; }

  // Takes the step, or returns false, having written nothing. `grads` must live until it returns.
  bool take(const py::list& grads, const py::tuple& options, int percentile) {
    PlannedStep step{};
    const auto count = static_cast<Py_ssize_t>(tensors_.size());
    if (stale_ || PyList_GET_SIZE(grads.ptr()) != count ||
        PyTuple_GET_SIZE(options.ptr()) < Options::kLeast) {
      return false;
    }
    step.count = count;
    step.percentile = percentile;
    if (!Options(options.ptr(), reader_, known_[0].layout->known()).read(step)) return false;
    if (percentile < 0) return false;
    if (percentile < kNoPercentile && step.gnorm_scales != nullptr) return false;
    for (Py_ssize_t i = 0; i < count; ++i) {
      const auto& [type, layout] = known_[i];
      PyObject* const param = PyTuple_GET_ITEM(params_.ptr(), i);
      PyObject* const grad = PyList_GET_ITEM(grads.ptr(), i);
      dlpack::Tensor t{};
      if (Py_TYPE(param) != type || !reader_.read(param, t) || !layout->fits(t) ||
          t.data != tensors_[i].param) {
        stale_ = true;
        return false;
      }
      if (!reader_.is_tensor(grad) || !reader_.read(grad, t) || !layout->fits(t)) return false;
      tensors_[i].grad = t.data;
    }
    step.plan = held_.number;
    step.dtype = dtype_;
    step.tensors = tensors_.data();
    char message[1024] = "";
    PlanOutcome outcome;
    {
      const py::gil_scoped_release unlocked;
      outcome = held_.library.take(&step, message, sizeof(message));
    }
    if (outcome == PlanOutcome::kFailed) throw std::runtime_error(message);
    stale_ = outcome == PlanOutcome::kStale;
    return !stale_;
  }

 private:
  struct Known {
    PyTypeObject* type;
    const Layout* layout;
  };

  HeldPlan held_;
  TensorReader reader_;
  py::tuple params_;
  std::set<Layout> layouts_;  // few, of many parameters
  std::vector<Known> known_;
  std::vector<PlannedTensor> tensors_;
  DType dtype_ = DType::kFloat32;
  bool stale_ = false;
};

}  // namespace

void define_step_plan(py::module_& m) {
  py::class_<StepPlan>(m, "StepPlan",
                       "Optimizer steps over a list of parameters that was checked once.")
      .def(py::init<const std::string&, int64_t, const py::type&, const py::tuple&>(),
           py::arg("library"), py::arg("number"), py::arg("tensor_class"), py::arg("params"),
           "The plan that the op _optimizer_plan of a library made of these parameters. It is "
           "dropped with this object.")
      .def("take", &StepPlan::take, py::arg("grads"), py::arg("options"),
           py::arg("percentile") = kNoPercentile,
           "Takes a step, after percentile clipping if that is asked for, counts it, and returns "
           "True; or returns False, having written nothing, where gradients or options need the "
           "op, or where the plan is stale.")
      .def_property_readonly("stale", &StepPlan::stale,
                             "Whether parameters or states lie elsewhere than when it was made.");
}

}  // namespace bnb
