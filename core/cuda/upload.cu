#include "cuda/upload.h"

#include "cuda/launch.cuh"

namespace prt {

struct Upload::Lane {
  explicit Lane(int32_t device) : context(device), pinned(pinned_buffer(device, 2 * kPiece, "loading weights")) {}
  CudaContext context;
  Buffer pinned;
  CudaEvent sent[2];
};

Upload::Upload(int32_t device) : device_(device) {}
Upload::~Upload() = default;

void Upload::write(void* dst, int64_t bytes, const Fill& fill) {
  const DeviceScope scope(device_);
  std::unique_ptr<Lane> lane;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!idle_.empty()) {
      lane = std::move(idle_.back());
      idle_.pop_back();
    }
  }
  if (!lane) lane = std::make_unique<Lane>(device_);
  const CudaStream& stream = lane->context.stream();
  int piece = 0;
  for (int64_t at = 0; at < bytes; at += kPiece, piece ^= 1) {
    const int64_t n = std::min(kPiece, bytes - at);
    char* staging = lane->pinned.data() + piece * kPiece;
    lane->sent[piece].wait();
    fill(staging, at, n);
    copy_to_device(stream, static_cast<char*>(dst) + at, staging, n);
    lane->sent[piece].record(stream);
  }
  synchronize(stream);
  const std::lock_guard<std::mutex> lock(mutex_);
  idle_.push_back(std::move(lane));
}

}  // namespace prt
