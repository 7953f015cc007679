// prt-bench: speed of the library on one device, with random weights. See usage() in options.cc.
#include <cstdio>

#include "prt_bench/end_to_end.h"
#include "prt_bench/machine.h"

namespace prt_bench {

namespace {

// The device asked for, or the first usable GPU, or the CPU.
prt_device_info choose_device(const std::string& wanted) {
  int32_t n = 0;
  if (prt_device_count(&n) != PRT_OK) throw Failure(1, prt_last_error());
  prt_device_info cpu = PRT_DEVICE_INFO_INIT;
  std::string there;
  for (int32_t i = 0; i < n; ++i) {
    prt_device_info info = PRT_DEVICE_INFO_INIT;
    if (prt_device_get(i, &info) != PRT_OK) throw Failure(1, prt_last_error());
    if (!info.is_cuda) cpu = info;
    there += (there.empty() ? "" : ", ") + std::string(info.id);
    if (wanted.empty() ? info.is_cuda && info.usable : wanted == info.id || (wanted == "cuda" && info.is_cuda)) {
      if (!info.usable) throw Failure(2, "--device " + wanted + " (" + info.name + ") cannot be used: " + info.note);
      return info;
    }
  }
  if (wanted.empty()) return cpu;
  throw Failure(2, "--device is '" + wanted + "', available: " + there);
}

void run(const Options& asked) {
  Report report;
  report.options = asked;
  report.config = find_config(asked.config);
  report.date = utc_now();
  std::vector<int64_t> used_before;  // read before anything starts CUDA
  for (int32_t i = 0; i < gpu_count(); ++i) used_before.push_back(gpu_memory_used(i));
  const prt_device_info device = choose_device(asked.device);
  if (asked.ops && !device.is_cuda) throw Failure(2, "--ops times the operations of a GPU; the device is " + std::string(device.id));
  std::FILE* out = nullptr;
  if (!asked.out_file.empty() && !(out = std::fopen(asked.out_file.c_str(), "w")))
    throw Failure(2, "--out " + asked.out_file + " cannot be written");
  report.options.device = device.id;
  report.machine.device = device.id;
  report.machine.name = device.name;
  report.machine.features = device.features;
  report.machine.memory_total = device.memory_total;
  report.machine.memory_free = device.memory_free;
  if (device.is_cuda) {
    report.used_before = used_before.at(static_cast<size_t>(device.index));
    describe_device(device.index, report.machine);  // starts CUDA on it
    report.used_by_cuda = gpu_memory_used(device.index);
    if (asked.ceilings) report.ceilings = measure_ceilings(device.index);
  }
  if (asked.end_to_end)
    run_end_to_end(report, [&] {
      if (device.is_cuda) report.used_after = gpu_memory_used(device.index);
    });
  if (asked.ops) measure_ops(device.index, report);
  std::fputs(render(report, asked.output).c_str(), stdout);
  if (out) {
    std::fputs(render(report, "json").c_str(), out);
    if (std::fclose(out) != 0) throw Failure(1, "writing " + asked.out_file + " failed");
  }
}

}  // namespace

}  // namespace prt_bench

int main(int argc, char** argv) {
  using namespace prt_bench;
  try {
    const Options options = parse_options(argc, argv);
    if (options.help) std::fputs(usage().c_str(), stdout);
    else if (options.version) std::printf("prt-bench %s %s\n", prt_version(), options.commit.c_str());
    else if (options.list_configs) std::fputs(render_configs(options.output).c_str(), stdout);
    else run(options);
    return 0;
  } catch (const Failure& failure) {
    std::fprintf(stderr, "prt-bench: %s\n", failure.what());
    return failure.code;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "prt-bench: %s\n", error.what());
    return 1;
  }
}
