// The host's side of the CUDA kernels in C++: one call from Python for a forward pass, and a node of PyTorch's autograd
// that launches the backward pass without Python's lock. It does what fbn_plugin/ops/cuda/__init__.py and
// fbn_plugin/ops/eager.py do in Python, for the calls that they hand over to it: plain tensors, plans that are made. All
// else is given back to them: here nothing is planned, compiled or refused. It needs PyTorch's headers and none of
// CUDA's: the driver's functions are handed over by their addresses. host.py builds and loads it.

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/zeros.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

namespace {

using at::Tensor;
using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// --- the driver and the kernels' arguments ---------------------------------------------------------------------------

// The structures of kernels.cu before their Cut, and how struct.Struct writes them (plan.py): host.py compares.
struct Forward {
  const void *x, *residual, *y, *weight, *bias, *mean, *var, *count, *moments, *partial, *counters;
  double t_sigma, eps, kappa, momentum;
  float slope;
  int weight_type, bias_type;
};
struct Backward {
  const void *grad, *x, *other, *dx, *dz, *weight, *bias, *moments, *coefficients, *sums, *partial, *counters;
  double eps, kappa;
  float slope;
  int weight_type, bias_type, paper, is_output;
};
struct Finish {
  const void *sums, *weight, *moments, *coefficients, *gradients;
  double kappa;
  int weight_type, samples, channels, set_channels, sets;
};
constexpr const char* FORMATS[] = {"@11P4df2i4x", "@12P2df4i4x", "@5Pd5i"};
constexpr size_t FINISH_BYTES = 5 * sizeof(void*) + sizeof(double) + 5 * sizeof(int);  // no end to align: no Cut follows
static_assert(sizeof(Forward) == 136 && sizeof(Backward) == 136 && sizeof(Finish) >= FINISH_BYTES);

constexpr size_t MOST_CUT = 256;  // bytes

template <class Head>
struct Arguments {
  Head head;
  char cut[MOST_CUT];
};

struct Driver {
  int (*launch)(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*, void**, void**);
  int (*get_context)(void**);
  int (*set_context)(void*);
  int (*push_context)(void*);
  int (*pop_context)(void**);
  int (*error_name)(int, const char**);
};

// A kernel with its cut.
struct Kernel {
  void* function = nullptr;
  unsigned grid = 0, threads = 0, shared = 0;
  int64_t floats = 0, counters = 0;  // of workspace
  std::string cut;
};

struct Planned {
  Kernel forward, backward;
  std::optional<Kernel> result, finish;
  int64_t sum_samples, channels, set_channels, sets, num_groups, samples;

  std::vector<int64_t> sizes(int64_t rows) const {
    return num_groups ? std::vector<int64_t>{rows, samples, num_groups} : std::vector<int64_t>{rows, channels};
  }
};

// --- what is kept ----------------------------------------------------------------------------------------------------

struct Key {
  c10::SmallVector<int64_t, 12> parts;
  bool operator==(const Key& other) const { return parts == other.parts; }
};
struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 14695981039346656037u;
    for (auto part : key.parts) hash = (hash ^ static_cast<uint64_t>(part)) * 1099511628211u, hash ^= hash >> 29;
    return hash;
  }
};

struct Device {
  Tensor partial, counters;  // the default stream's workspace, which Python makes
  std::unordered_set<uint64_t> streams;  // that the plans reckon with, beside the default one
  void* context = nullptr;  // that the kernels are loaded in
};

struct State {
  Driver driver;
  at::DeviceType type;
  c10::DispatchKeySet plain;  // of a tensor about which nothing is special
  std::mutex mutex;  // for what follows
  std::unordered_map<Key, std::shared_ptr<const Planned>, Hash> plans;
  std::unordered_map<int, Device> devices;
  std::unordered_map<double, double> kappas;

  bool is_plain(const Tensor& t) const { return t.key_set() == plain; }

  std::shared_ptr<const Planned> find(const Key& key) {
    std::lock_guard<std::mutex> lock(mutex);
    auto found = plans.find(key);
    return found == plans.end() ? nullptr : found->second;
  }
};

// Nothing but eager PyTorch sees what is called here: no mode, no tracer, no transform, no inference mode.
bool nobody_watches() { return c10::impl::tls_local_dispatch_key_set().included_ == c10::default_included_set; }

// Whether this is the device that PyTorch's current streams and the default one belong to.
bool is_current(const Tensor& x) {
  return x.is_cpu() || c10::impl::getDeviceGuardImpl(x.device().type())->getDevice() == x.device();
}

int64_t stream_id(const Tensor& x) { return c10::impl::getDeviceGuardImpl(x.device().type())->getStream(x.device()).id(); }

int index_of(const Tensor& x) { return x.device().has_index() ? x.device().index() : 0; }

uintptr_t address(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()); }

// Contiguous with the channels as the last dimension; false, too, if it is contiguous as it is.
bool is_channels_last(const Tensor& x) {
  int64_t expected = 1;
  auto goes_on = [&](int64_t d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
    return true;
  };
  if (!goes_on(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; d--)
    if (!goes_on(d)) return false;
  return goes_on(0);
}

// What a plan is for; empty if there can be none.
Key key_of(const Tensor& x, int64_t num_groups, int64_t activation) {
  Key key;
  bool contiguous = x.is_contiguous();
  if (x.dim() < 2 || x.numel() == 0 || (!contiguous && !is_channels_last(x))) return key;
  key.parts.append(x.sizes().begin(), x.sizes().end());
  key.parts.push_back(static_cast<int64_t>(x.scalar_type()) << 8 | !contiguous << 4 | (address(x) & 15));
  key.parts.push_back(index_of(x));
  key.parts.push_back(num_groups);
  key.parts.push_back(activation);
  return key;
}

// --- launching -------------------------------------------------------------------------------------------------------

// Partial sums and counters of a launch.
struct Workspace {
  Tensor partial, counters;
  bool enough(const Kernel& kernel) const {
    return !kernel.floats ||
           (partial.defined() && partial.numel() >= kernel.floats && counters.numel() >= kernel.counters);
  }
};

// The default stream's is Python's to make; on other streams each launch has its own.
Workspace default_workspace(State& state, int device) {
  std::lock_guard<std::mutex> lock(state.mutex);
  auto& kept = state.devices[device];
  return {kept.partial, kept.counters};
}

Workspace workspace(const Workspace& of_default, const Kernel& kernel, void* stream, const Tensor& x) {
  if (!kernel.floats) return {};
  if (!stream) return of_default;
  return {at::empty({kernel.floats}, x.options().dtype(at::kFloat)),
          at::zeros({kernel.counters}, x.options().dtype(at::kInt))};
}

void check(State& state, int error) {
  const char* name = nullptr;
  if (error && state.driver.error_name) state.driver.error_name(error, &name);
  TORCH_CHECK(!error, "cuLaunchKernel: ", name ? name : std::to_string(error).c_str());
}

void launch(State& state, const Kernel& kernel, int device, void* stream, void* arguments) {
  void* parameters[] = {arguments};
  auto once = [&] {
    return state.driver.launch(kernel.function, kernel.grid, 1, 1, kernel.threads, 1, 1, kernel.shared, stream,
                               parameters, nullptr);
  };
  int error = once();
  // INVALID_CONTEXT, INVALID_HANDLE, CONTEXT_IS_DESTROYED: a thread that PyTorch has not yet given a context, as one of
  // autograd's may be, or one whose current context is another.
  if ((error == 201 || error == 400 || error == 709) && state.driver.get_context) {
    void *context = nullptr, *before = nullptr;
    {
      std::lock_guard<std::mutex> lock(state.mutex);
      context = state.devices[device].context;
    }
    if (context && !state.driver.get_context(&before)) {
      if (!before) {  // and the thread keeps it, as from PyTorch's own first call
        if (!state.driver.set_context(context)) error = once();
      } else if (!state.driver.push_context(context)) {
        error = once();
        state.driver.pop_context(&context);
      }
    }
  }
  check(state, error);
}

template <class Head>
void launch(State& state, const Kernel& kernel, int device, void* stream, const Head& head) {
  Arguments<Head> arguments;
  arguments.head = head;
  std::memcpy(arguments.cut, kernel.cut.data(), kernel.cut.size());
  launch(state, kernel, device, stream, static_cast<void*>(&arguments));
}

const void* pointer(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }

// How kernels.cu counts the types of weight and bias; -1: not these.
int parameter_type(const Tensor& t) {
  if (!t.defined()) return 0;
  if (!t.is_contiguous()) return -1;
  switch (t.scalar_type()) {
    case at::kFloat: return 0;
    case at::kBFloat16: return 1;
    case at::kHalf: return 2;
    case at::kDouble: return 3;
    default: return -1;
  }
}

// `other` in the layout and dtype of `x`, at an address that is as good.
Tensor like(const Tensor& x, const Tensor& other) {
  if (other.strides() == x.strides() && other.scalar_type() == x.scalar_type() && !(address(other) & 15)) return other;
  return at::empty_like(x).copy_(other);
}

// --- the options -----------------------------------------------------------------------------------------------------

constexpr const char* ACTIVATIONS[] = {"identity", "relu", "leaky_relu", "silu"};
constexpr int64_t ACTIVATION_CODES[] = {0, 1, 1, 2};  // of a plan

// fbn_plugin.ops.reference.Options, checked there.
struct Options {
  int64_t num_groups;
  double t_sigma, eps;
  bool correction, paper;
  int activation;
  double negative_slope;

  int64_t code() const { return ACTIVATION_CODES[activation]; }
  bool sign_tells() const { return activation == 1 || activation == 2; }
  float slope() const { return activation == 2 ? static_cast<float>(negative_slope) : 0.0f; }

  static std::optional<Options> of(PyObject* tuple) {
    if (!PyTuple_Check(tuple) || PyTuple_GET_SIZE(tuple) != 7) return std::nullopt;
    auto item = [&](int i) { return PyTuple_GET_ITEM(tuple, i); };
    if (!PyLong_Check(item(0)) || !PyFloat_Check(item(1)) || !PyUnicode_Check(item(4)) || !PyUnicode_Check(item(5)))
      return std::nullopt;
    Options o;
    o.num_groups = PyLong_AsLongLong(item(0));
    o.t_sigma = PyFloat_AS_DOUBLE(item(1));
    o.eps = PyFloat_AsDouble(item(2));
    o.correction = PyObject_IsTrue(item(3)) == 1;
    o.paper = PyUnicode_CompareWithASCIIString(item(4), "paper") == 0;
    o.negative_slope = PyFloat_AsDouble(item(6));
    for (o.activation = 0; o.activation < 4; o.activation++)
      if (PyUnicode_CompareWithASCIIString(item(5), ACTIVATIONS[o.activation]) == 0) break;
    if (PyErr_Occurred()) {  // symbols instead of numbers, say
      PyErr_Clear();
      return std::nullopt;
    }
    if (o.activation == 4 || std::isinf(o.t_sigma)) return std::nullopt;
    return o;
  }
};

// --- backward --------------------------------------------------------------------------------------------------------

// What a node of autograd is held by: an std::shared_ptr, in later versions of PyTorch an intrusive one.
using NodePointer = decltype(std::declval<torch::autograd::Edge>().function);

template <class Pointer>
void tell_creation(const Pointer& node) {  // to torch.autograd.graph's hooks, where there are such
  if constexpr (requires { fire_node_creation_hooks(node); }) fire_node_creation_hooks(node);
}

template <class Made, class Pointer>
Pointer make_node() {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<Node>>)
    return Pointer(new Made());
  else
    return Pointer::unsafe_steal_from_new(new Made());
}

struct FilteredNormBackward : Node {
  std::shared_ptr<State> state;
  Options options;
  SavedVariable x_, weight_, bias_, other_, moments_;
  bool other_is_output = false;
  double kappa = 1.0;
  void* stream = nullptr;
  int64_t id = 0;  // PyTorch's of the stream
  bool released = false;

  std::string name() const override { return "FilteredNormBackward"; }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    for (auto* saved : {&x_, &weight_, &bias_, &other_, &moments_}) saved->reset_data();
    released = true;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    TORCH_CHECK(!released, torch::autograd::ERR_BACKWARD_TWICE);
    const Tensor x = x_.unpack(), weight = weight_.unpack(), bias = bias_.unpack();
    const Tensor other = other_is_output ? other_.unpack(getptr()) : other_.unpack(), moments = moments_.unpack();
    const Tensor grad = grads[0].defined() ? grads[0] : input_metadata(0).zeros_like();
    auto gradients = quick(grad, x, weight, bias, other, moments);
    if (!gradients) gradients = operators(grad, x, weight, bias, other, moments);
    auto& [dx, d_weight, d_bias, dz] = *gradients;
    variable_list result(4);
    result[0] = std::move(dx);
    if (task_should_compute_output(1)) result[1] = std::move(d_weight);
    if (task_should_compute_output(2)) result[2] = std::move(d_bias);
    if (task_should_compute_output(3)) result[3] = other.defined() ? std::move(dz) : grad;
    return result;
  }

  // The gradients of x, weight, bias and residual by the kernels; nothing where that is not for this file.
  std::optional<std::array<Tensor, 4>> quick(const Tensor& grad, const Tensor& x, const Tensor& weight,
                                             const Tensor& bias, const Tensor& other, const Tensor& moments) {
    if (c10::GradMode::is_enabled() || !nobody_watches()) return std::nullopt;
    for (const auto* t : {&grad, &x, &weight, &bias, &other, &moments})
      if (t->defined() && (!state->is_plain(*t) || torch::autograd::isFwGradDefined(*t) || t->device() != x.device()))
        return std::nullopt;
    // A hook on saved tensors may have given back others.
    const int weight_type = parameter_type(weight), bias_type = parameter_type(bias);
    if (weight_type < 0 || bias_type < 0 || grad.sizes() != x.sizes() || !is_current(x)) return std::nullopt;
    if (other.defined() && other.sizes() != x.sizes()) return std::nullopt;
    const auto planned = state->find(key_of(x, options.num_groups, options.code()));
    if (!planned || moments.scalar_type() != at::kFloat || !moments.is_contiguous()) return std::nullopt;
    if (moments.sizes() != planned->sizes(5)) return std::nullopt;
    for (const auto* t : {&weight, &bias})
      if (t->defined() && t->numel() != planned->channels) return std::nullopt;
    void* on = stream;
    if (const auto now = stream_id(x); now != id) {
      if (now) return std::nullopt;  // a stream whose handle is not known here
      on = nullptr;
    }
    const int device = index_of(x);
    Workspace kept;
    if (!on) {
      kept = default_workspace(*state, device);
      if (!kept.enough(planned->backward) || (planned->result && !kept.enough(*planned->result))) return std::nullopt;
    }

    at::AutoDispatchBelowADInplaceOrView below;
    const auto floats = x.options().dtype(at::kFloat);
    const int64_t channels = planned->channels, samples = planned->sum_samples;
    const Tensor dx = at::empty_like(x), gradients = at::empty({2, channels}, floats);
    Tensor other_like, dz, coefficients;
    if (other.defined()) other_like = like(x, other), dz = at::empty_like(x);
    const Tensor sums = samples ? at::empty({2, samples, channels}, floats) : gradients;
    if (planned->result) coefficients = at::empty(planned->sizes(2), floats);
    const Tensor grad_like = like(x, grad);
    auto run = [&](const Kernel& kernel) {
      const auto space = workspace(kept, kernel, on, x);
      const Backward head{pointer(grad_like), pointer(x), pointer(other_like), pointer(dx), pointer(dz),
                          pointer(weight), pointer(bias), pointer(moments), pointer(coefficients), pointer(sums),
                          pointer(space.partial), pointer(space.counters), options.eps, kappa, options.slope(),
                          weight_type, bias_type, options.paper, options.sign_tells()};
      launch(*state, kernel, device, on, head);
    };
    run(planned->backward);
    if (samples) {
      Finish head{pointer(sums), pointer(weight), pointer(moments), pointer(coefficients), pointer(gradients), kappa,
                  weight_type, static_cast<int>(samples), static_cast<int>(channels),
                  static_cast<int>(planned->set_channels),
                  static_cast<int>(coefficients.defined() ? planned->sets : 0)};
      Kernel finish = *planned->finish;
      finish.grid = (2 * channels + head.sets + finish.threads - 1) / finish.threads;
      launch(*state, finish, device, on, static_cast<void*>(&head));
    }
    if (planned->result) run(*planned->result);
    return std::array<Tensor, 4>{dx, gradients.select(0, 1), gradients.select(0, 0), dz};
  }

  // The same by the operator (fbn_plugin/ops/library.py): it knows all tensors, tangents and second derivatives.
  std::array<Tensor, 4> operators(const Tensor& grad, const Tensor& x, const Tensor& weight, const Tensor& bias,
                                  const Tensor& other, const Tensor& moments) const {
    static const auto handle = c10::Dispatcher::singleton().findSchemaOrThrow("fbn_plugin::filtered_norm_gradients", "");
    auto optional = [](const Tensor& t) { return t.defined() ? c10::IValue(t) : c10::IValue(); };
    torch::jit::Stack stack{grad, x, optional(weight), optional(bias), optional(other), moments,
                            options.num_groups, options.t_sigma, options.eps, options.correction,
                            std::string(options.paper ? "paper" : "exact"),
                            std::string(ACTIVATIONS[options.activation]), options.negative_slope};
    handle.callBoxed(stack);
    return {stack[0].toTensor(), stack[1].toTensor(), stack[2].toTensor(), stack[3].toTensor()};
  }

  // Compiled autograd: what the node is, and what it does with other tensors in the place of those saved. The base's
  // function is const in later versions of PyTorch: one of the two is it.
  template <class Args>
  void tell(Args& args) const {
    args.collect(options.num_groups);
    args.collect(options.t_sigma);
    args.collect(options.eps);
    args.collect(options.correction);
    args.collect(options.paper);
    args.collect(static_cast<int64_t>(options.activation));
    args.collect(options.negative_slope);
    args.collect(x_, false);
    args.collect(weight_, false);
    args.collect(bias_, false);
    args.collect(other_, other_is_output);
    args.collect(moments_, false);
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) { tell(args); }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const { tell(args); }
  variable_list apply_with_saved(const variable_list& inputs, torch::dynamo::autograd::SwapSavedVariables& saved) override {
    const std::array<SavedVariable*, 5> all{&x_, &weight_, &bias_, &other_, &moments_};
    for (auto* each : all) saved.before(*each);
    auto result = apply(variable_list(inputs));
    for (auto* each : all) saved.after(*each);
    return result;
  }
};

// --- forward ---------------------------------------------------------------------------------------------------------

struct Table {
  PyObject_HEAD
  std::shared_ptr<State> state;
  PyObject* stream_of;  // the handle of the current stream of a device, by its index
};

// What a call is given, checked as fbn_plugin/ops/functional.py does: what it refuses is not taken here.
struct Call {
  Tensor x, weight, bias, residual, mean, var, count;
  double momentum = 0.0;
};

PyObject* none() { Py_RETURN_NONE; }  // not for this file
PyObject* missing() { Py_RETURN_FALSE; }  // for this file once Python has handed over what is missing

Tensor run(const std::shared_ptr<State>& state, const Call& call, const Options& options, const Planned& planned,
           double kappa, void* stream, const Workspace& kept) {
  const auto& x = call.x;
  const int device = index_of(x);
  Tensor y, moments;
  {
    at::AutoDispatchBelowADInplaceOrView below;
    y = at::empty_like(x);
    moments = at::empty(planned.sizes(5), x.options().dtype(at::kFloat));
    const Tensor residual = call.residual.defined() ? like(x, call.residual) : Tensor();
    double momentum = call.momentum;
    if (call.mean.defined()) {
      if (call.count.defined()) {
        if (momentum < 0) const_cast<Tensor&>(call.count).add_(1);  // before the launch, which reads it
        call.count.unsafeGetTensorImpl()->bump_version();
      }
      call.mean.unsafeGetTensorImpl()->bump_version();
      call.var.unsafeGetTensorImpl()->bump_version();
    }
    const auto space = workspace(kept, planned.forward, stream, x);
    const Forward head{pointer(x), pointer(residual), pointer(y), pointer(call.weight), pointer(call.bias),
                       pointer(call.mean), pointer(call.var), pointer(call.count), pointer(moments),
                       pointer(space.partial), pointer(space.counters), options.t_sigma, options.eps, kappa, momentum,
                       options.slope(), parameter_type(call.weight), parameter_type(call.bias)};
    launch(*state, planned.forward, device, stream, head);
  }
  if (torch::autograd::compute_requires_grad(x, call.weight, call.bias, call.residual)) {
    auto node = make_node<FilteredNormBackward, NodePointer>();
    auto& made = static_cast<FilteredNormBackward&>(*node);
    made.state = state;
    made.options = options;
    made.kappa = kappa;
    made.stream = stream;
    made.id = stream_id(x);
    made.set_next_edges(torch::autograd::collect_next_edges(x, call.weight, call.bias, call.residual));
    torch::autograd::set_history(y, node);
    made.x_ = SavedVariable(x, false);
    made.weight_ = SavedVariable(call.weight, false);
    if (options.activation) {
      made.bias_ = SavedVariable(call.bias, false);
      if (call.residual.defined()) {
        made.other_is_output = options.sign_tells();
        made.other_ = made.other_is_output ? SavedVariable(y, true) : SavedVariable(call.residual, false);
      }
    }
    made.moments_ = SavedVariable(moments, false);
    tell_creation(node);
  }
  return y;
}

PyObject* normalize(PyObject* self, PyObject* const* arguments, Py_ssize_t number) {
  HANDLE_TH_ERRORS
  if (number != 9) {
    PyErr_SetString(PyExc_TypeError, "normalize takes x, weight, bias, residual, mean, var, momentum, count, options");
    return nullptr;
  }
  auto& table = *reinterpret_cast<Table*>(self);
  State& state = *table.state;
  if (!nobody_watches()) return none();
  Call call;
  Tensor* const tensors[] = {&call.x, &call.weight, &call.bias, &call.residual, &call.mean, &call.var, &call.count};
  constexpr int places[] = {0, 1, 2, 3, 4, 5, 7};
  for (int i = 0; i < 7; i++) {
    PyObject* given = arguments[places[i]];
    if (given == Py_None) continue;
    if (!THPVariable_CheckExact(given)) return none();
    const Tensor& tensor = THPVariable_Unpack(given);
    if (!state.is_plain(tensor) || torch::autograd::isFwGradDefined(tensor)) return none();
    *tensors[i] = tensor;
  }
  const Tensor& x = call.x;
  const auto options = Options::of(arguments[8]);
  if (!x.defined() || x.device().type() != state.type || x.dim() < 2 || !options) return none();
  const int64_t channels = x.size(1), num_groups = options->num_groups;
  for (int i = 1; i < 7; i++)
    if (tensors[i]->defined() && tensors[i]->device() != x.device()) return none();
  for (const auto* t : {&call.weight, &call.bias, &call.mean, &call.var})
    if (t->defined() && t->numel() != channels) return none();
  if (parameter_type(call.weight) < 0 || parameter_type(call.bias) < 0) return none();
  if (x.numel() == (num_groups ? num_groups : channels)) return none();
  if (call.residual.defined() &&
      (call.residual.sizes() != x.sizes() || call.residual.scalar_type() != x.scalar_type()))
    return none();
  if (call.mean.defined() != call.var.defined() || (call.count.defined() && !call.mean.defined())) return none();
  if (call.mean.defined()) {
    for (const auto* t : {&call.mean, &call.var})
      if (num_groups || t->scalar_type() != at::kFloat || !t->is_contiguous()) return none();
    if (call.count.defined() && (call.count.scalar_type() != at::kLong || call.count.numel() != 1)) return none();
    PyObject* momentum = arguments[6];
    if (momentum == Py_None)
      call.momentum = call.count.defined() ? -1.0 : 0.0;
    else if (PyFloat_CheckExact(momentum) && PyFloat_AS_DOUBLE(momentum) >= 0)  // below 0 has a meaning of its own
      call.momentum = PyFloat_AS_DOUBLE(momentum);
    else
      return none();
  }
  if (!is_current(x)) return none();

  const int device = index_of(x);
  PyObject* index = PyLong_FromLong(device);
  PyObject* handle = index ? PyObject_CallFunctionObjArgs(table.stream_of, index, nullptr) : nullptr;
  Py_XDECREF(index);
  if (!handle) return nullptr;
  void* stream = PyLong_AsVoidPtr(handle);
  Py_DECREF(handle);
  if (PyErr_Occurred()) return nullptr;

  const auto planned = state.find(key_of(x, num_groups, options->code()));
  if (!planned) return missing();
  double kappa = 1.0;
  Workspace kept;
  {
    std::lock_guard<std::mutex> lock(state.mutex);
    const auto& known = state.devices[device];
    if (stream && !known.streams.count(reinterpret_cast<uint64_t>(stream))) return missing();
    if (!stream) kept = {known.partial, known.counters};
    if (options->correction) {
      const auto found = state.kappas.find(options->t_sigma);
      if (found == state.kappas.end()) return missing();
      kappa = found->second;
    }
  }
  if (!stream && !kept.enough(planned->forward)) return missing();

  Tensor y;
  {
    py::gil_scoped_release release;
    y = run(table.state, call, *options, *planned, kappa, stream, kept);
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

// --- what Python hands over ------------------------------------------------------------------------------------------

Kernel kernel_of(const py::handle& given) {
  const auto [function, grid, threads, shared, cut, floats, counters] =
      given.cast<std::tuple<uintptr_t, unsigned, unsigned, unsigned, py::bytes, int64_t, int64_t>>();
  Kernel kernel{reinterpret_cast<void*>(function), grid, threads, shared, floats, counters, cut};
  TORCH_CHECK_VALUE(kernel.cut.size() <= MOST_CUT, "a cut of ", kernel.cut.size(), " bytes");
  return kernel;
}

// add(x, num_groups, activation, forward, backward, result, finish, sum_samples, set_channels, sets)
PyObject* add(PyObject* self, PyObject* arguments) {
  HANDLE_TH_ERRORS
  State& state = *reinterpret_cast<Table*>(self)->state;
  const auto given = py::reinterpret_borrow<py::tuple>(arguments);
  TORCH_CHECK_TYPE(given.size() == 10 && THPVariable_Check(given[0].ptr()), "add takes a tensor and nine others");
  const Tensor& x = THPVariable_Unpack(given[0].ptr());
  auto planned = std::make_shared<Planned>();
  planned->num_groups = given[1].cast<int64_t>();
  planned->samples = x.size(0);
  planned->channels = x.size(1);
  planned->forward = kernel_of(given[3]);
  planned->backward = kernel_of(given[4]);
  if (!given[5].is_none()) planned->result = kernel_of(given[5]);
  if (!given[6].is_none()) planned->finish = kernel_of(given[6]);
  planned->sum_samples = given[7].cast<int64_t>();
  planned->set_channels = given[8].cast<int64_t>();
  planned->sets = given[9].cast<int64_t>();
  TORCH_CHECK_VALUE(!planned->sum_samples || planned->finish, "sums of samples, and no kernel to add them up");
  auto key = key_of(x, planned->num_groups, given[2].cast<int64_t>());
  TORCH_CHECK_VALUE(!key.parts.empty(), "no plan can be for this tensor");
  std::lock_guard<std::mutex> lock(state.mutex);
  state.plans[std::move(key)] = std::move(planned);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// workspace(device, partial, counters): of the default stream
PyObject* set_workspace(PyObject* self, PyObject* arguments) {
  HANDLE_TH_ERRORS
  int device;
  PyObject *partial, *counters;
  if (!PyArg_ParseTuple(arguments, "iOO", &device, &partial, &counters)) return nullptr;
  TORCH_CHECK_TYPE(THPVariable_Check(partial) && THPVariable_Check(counters), "workspace takes two tensors");
  State& state = *reinterpret_cast<Table*>(self)->state;
  std::lock_guard<std::mutex> lock(state.mutex);
  auto& kept = state.devices[device];
  kept.partial = THPVariable_Unpack(partial);
  kept.counters = THPVariable_Unpack(counters);
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// stream(device, handle, forget): a stream that the plans reckon with; those made before may not
PyObject* add_stream(PyObject* self, PyObject* arguments) {
  int device, forget;
  unsigned long long handle;
  if (!PyArg_ParseTuple(arguments, "iKp", &device, &handle, &forget)) return nullptr;
  State& state = *reinterpret_cast<Table*>(self)->state;
  std::lock_guard<std::mutex> lock(state.mutex);
  if (forget) state.plans.clear();
  state.devices[device].streams.insert(handle);
  Py_RETURN_NONE;
}

// kappa(t_sigma, value)
PyObject* add_kappa(PyObject* self, PyObject* arguments) {
  double t_sigma, value;
  if (!PyArg_ParseTuple(arguments, "dd", &t_sigma, &value)) return nullptr;
  State& state = *reinterpret_cast<Table*>(self)->state;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.kappas[t_sigma] = value;
  Py_RETURN_NONE;
}

// context(device, handle)
PyObject* set_context(PyObject* self, PyObject* arguments) {
  int device;
  unsigned long long handle;
  if (!PyArg_ParseTuple(arguments, "iK", &device, &handle)) return nullptr;
  State& state = *reinterpret_cast<Table*>(self)->state;
  std::lock_guard<std::mutex> lock(state.mutex);
  state.devices[device].context = reinterpret_cast<void*>(handle);
  Py_RETURN_NONE;
}

// forget(everything): the plans, or the plans and all else
PyObject* forget(PyObject* self, PyObject* everything) {
  State& state = *reinterpret_cast<Table*>(self)->state;
  std::unordered_map<int, Device> gone;  // its tensors are freed without the lock
  std::lock_guard<std::mutex> lock(state.mutex);
  state.plans.clear();
  if (PyObject_IsTrue(everything) == 1) {
    state.kappas.clear();
    gone.swap(state.devices);
    for (auto& [index, device] : gone) state.devices[index].context = device.context;
  }
  Py_RETURN_NONE;
}

// Table(device_type, addresses, stream_of): addresses of cuLaunchKernel, cuCtxGetCurrent, cuCtxSetCurrent,
// cuCtxPushCurrent, cuCtxPopCurrent and cuGetErrorName; 0: there is none, but for the first
PyObject* make_table(PyTypeObject* type, PyObject* arguments, PyObject*) {
  HANDLE_TH_ERRORS
  const char* device_type;
  PyObject* stream_of;
  unsigned long long launch, get, set, push, pop, name;
  if (!PyArg_ParseTuple(arguments, "s(KKKKKK)O", &device_type, &launch, &get, &set, &push, &pop, &name, &stream_of))
    return nullptr;
  auto state = std::make_shared<State>();
  state->type = c10::Device(device_type).type();
  auto& driver = state->driver;
  driver.launch = reinterpret_cast<decltype(driver.launch)>(launch);
  driver.get_context = reinterpret_cast<decltype(driver.get_context)>(get);
  driver.set_context = reinterpret_cast<decltype(driver.set_context)>(set);
  driver.push_context = reinterpret_cast<decltype(driver.push_context)>(push);
  driver.pop_context = reinterpret_cast<decltype(driver.pop_context)>(pop);
  driver.error_name = reinterpret_cast<decltype(driver.error_name)>(name);
  {
    c10::InferenceMode normal(false);
    state->plain = at::empty({0}, at::TensorOptions().device(state->type)).key_set();
  }
  auto* table = reinterpret_cast<Table*>(type->tp_alloc(type, 0));
  if (!table) return nullptr;
  new (&table->state) std::shared_ptr<State>(std::move(state));
  Py_INCREF(stream_of);
  table->stream_of = stream_of;
  return reinterpret_cast<PyObject*>(table);
  END_HANDLE_TH_ERRORS
}

void free_table(PyObject* self) {
  auto* table = reinterpret_cast<Table*>(self);
  PyTypeObject* type = Py_TYPE(self);
  table->state.~shared_ptr();
  Py_XDECREF(table->stream_of);
  type->tp_free(self);
  Py_DECREF(type);
}

template <class Function>
PyCFunction as_function(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

PyMethodDef methods[] = {
    {"normalize", as_function(normalize), METH_FASTCALL, "y; None: not taken; False: something was not handed over."},
    {"add", as_function(add), METH_VARARGS, "A plan."},
    {"workspace", as_function(set_workspace), METH_VARARGS, "The default stream's workspace."},
    {"stream", as_function(add_stream), METH_VARARGS, "A stream that plans reckon with."},
    {"kappa", as_function(add_kappa), METH_VARARGS, "The variance of a cut Gaussian."},
    {"context", as_function(set_context), METH_VARARGS, "The context of a device's kernels."},
    {"forget", as_function(forget), METH_O, "Give up the plans; with True workspaces and streams, too."},
    {nullptr, nullptr, 0, nullptr},
};
PyType_Slot slots[] = {
    {Py_tp_new, reinterpret_cast<void*>(make_table)},
    {Py_tp_dealloc, reinterpret_cast<void*>(free_table)},
    {Py_tp_methods, methods},
    {0, nullptr},
};
PyType_Spec specification = {"fbn_plugin.ops.cuda._host.Table", sizeof(Table), 0, Py_TPFLAGS_DEFAULT, slots};
PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_host", "The host's side of the CUDA kernels.", -1, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__host() {
  PyObject* module = PyModule_Create(&definition);
  PyObject* type = module ? PyType_FromSpec(&specification) : nullptr;
  if (!type || PyModule_AddObject(module, "Table", type) < 0) return nullptr;
  PyObject* formats = Py_BuildValue("(sss)", FORMATS[0], FORMATS[1], FORMATS[2]);
  if (!formats || PyModule_AddObject(module, "FORMATS", formats) < 0) return nullptr;
  return module;
}
