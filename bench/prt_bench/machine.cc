#include "prt_bench/machine.h"

#include <dlfcn.h>

#include <map>
#include <memory>

namespace prt_bench {

namespace {

// The few functions of NVML that are used, looked up in the driver's library: no header and no link to it is needed.
class Nvml {
 public:
  explicit Nvml(const std::string& pci_bus_id) : library_(dlopen("libnvidia-ml.so.1", RTLD_NOW | RTLD_LOCAL)) {
    const auto init = find<int()>("nvmlInit_v2");
    const auto by_bus = find<int(const char*, void**)>("nvmlDeviceGetHandleByPciBusId_v2");
    ready_ = init && by_bus && init() == 0 && by_bus(pci_bus_id.c_str(), &device_) == 0;
  }
  ~Nvml() {
    if (library_) dlclose(library_);
  }
  Nvml(const Nvml&) = delete;
  Nvml& operator=(const Nvml&) = delete;

  std::string driver() const {
    char text[96] = "";
    if (const auto get = find<int(char*, unsigned)>("nvmlSystemGetDriverVersion"); ready_ && get) get(text, sizeof text);
    return text;
  }
  int32_t clock(const char* function, int kind) const {  // MHz
    unsigned value = 0;
    if (const auto get = find<int(void*, int, unsigned*)>(function); ready_ && get && get(device_, kind, &value) == 0)
      return static_cast<int32_t>(value);
    return 0;
  }
  int32_t power_limit_watts() const {
    unsigned milliwatts = 0;
    if (const auto get = find<int(void*, unsigned*)>("nvmlDeviceGetEnforcedPowerLimit"); ready_ && get) get(device_, &milliwatts);
    return static_cast<int32_t>(milliwatts / 1000);
  }
  int64_t memory_used() const {
    unsigned long long total_free_used[3] = {};  // nvmlMemory_t
    if (const auto get = find<int(void*, unsigned long long*)>("nvmlDeviceGetMemoryInfo"); ready_ && get) get(device_, total_free_used);
    return static_cast<int64_t>(total_free_used[2]);
  }

 private:
  template <class F>
  F* find(const char* name) const {
    return library_ ? reinterpret_cast<F*>(dlsym(library_, name)) : nullptr;
  }
  void *library_ = nullptr, *device_ = nullptr;
  bool ready_ = false;
};

// Kept open: to start NVML takes long, and clocks are read while the device is busy.
const Nvml& nvml_of(const std::string& pci_bus_id) {
  static std::map<std::string, std::unique_ptr<Nvml>> open;
  std::unique_ptr<Nvml>& nvml = open[pci_bus_id];
  if (!nvml) nvml = std::make_unique<Nvml>(pci_bus_id);
  return *nvml;
}

constexpr int kSm = 1, kMemory = 2;  // nvmlClockType_t

}  // namespace

void describe_gpu(const std::string& pci_bus_id, Machine& machine) {
  const Nvml& nvml = nvml_of(pci_bus_id);
  machine.driver = nvml.driver();
  machine.sm_mhz_max = nvml.clock("nvmlDeviceGetMaxClockInfo", kSm);
  machine.memory_mhz_max = nvml.clock("nvmlDeviceGetMaxClockInfo", kMemory);
  machine.power_limit_watts = nvml.power_limit_watts();
}

int64_t memory_used_now(const std::string& pci_bus_id) { return nvml_of(pci_bus_id).memory_used(); }

Clocks clocks_now(const std::string& pci_bus_id) {
  const Nvml& nvml = nvml_of(pci_bus_id);
  return {nvml.clock("nvmlDeviceGetClockInfo", kSm), nvml.clock("nvmlDeviceGetClockInfo", kMemory)};
}

}  // namespace prt_bench
