// embed.cpp - a language model inside a C++17 program: handles that release themselves, statuses as exceptions.
//
//   embed_cpp                           a tiny model with random weights: writes the tokens that embed.c writes
//   embed_cpp FOLDER N_NEW TOKEN...     a model from raw tensors: N_NEW tokens after the prompt TOKEN...
//
// FOLDER holds config.bin, a prt_model_config as it lies in memory, and for every tensor of the model NAME.bin, its numbers as f32.
// raw_tensors.py writes such a folder from any model that pyruntime reads.
// The steps themselves are explained in embed.c. Build: CMakeLists.txt in this folder, or with pkg-config as README.md says.
#include <pyruntime.h>

#include <cstdint>
#include <exception>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

void check(prt_status status) {
  if (status != PRT_OK) throw std::runtime_error(std::string(prt_status_name(status)) + ": " + prt_last_error());
}

template <auto release>
struct Release {
  template <class T>
  void operator()(T* handle) const {
    release(handle);
  }
};
using Model = std::unique_ptr<prt_model, Release<prt_model_release>>;
using Session = std::unique_ptr<prt_session, Release<prt_session_release>>;
using Sampler = std::unique_ptr<prt_sampler, Release<prt_sampler_release>>;

// make<Model>(prt_model_create, arguments...): the handle that the function writes to its last argument.
template <class Handle, class Create, class... Arguments>
Handle make(Create create, Arguments... arguments) {
  typename Handle::pointer handle = nullptr;
  check(create(arguments..., &handle));
  return Handle(handle);
}

// A sequence of a session, whose pages go back at the end of the scope. The session must outlive it.
class Sequence {
 public:
  explicit Sequence(prt_session* session) : session_(session) { check(prt_sequence_create(session, &id_)); }
  Sequence(const Sequence&) = delete;
  Sequence& operator=(const Sequence&) = delete;
  ~Sequence() { prt_sequence_free(session_, id_); }

  // Appends tokens and returns the one sampled after the last of them.
  int32_t step(const std::vector<int32_t>& tokens, prt_sampler* sampler) {
    const auto n_token = static_cast<int32_t>(tokens.size());
    int32_t sampled = -1;
    prt_batch batch = PRT_BATCH_INIT;
    batch.n_seq = 1;
    batch.seq = &id_;
    batch.n_token = &n_token;
    batch.tokens = tokens.data();
    batch.samplers = &sampler;
    batch.sampled = &sampled;
    check(prt_session_step(session_, &batch));
    return sampled;
  }

 private:
  prt_session* session_;
  int64_t id_ = 0;
};

// The model asks for its tensors one by one; load(model, info) gives it each.
template <class Load>
Model make_model(const prt_model_config& config, Load load) {
  auto model = make<Model>(prt_model_create, &config, "cpu");
  int32_t count = 0;
  check(prt_model_tensor_count(model.get(), &count));
  for (int32_t i = 0; i < count; ++i) {
    prt_tensor_info info = PRT_TENSOR_INFO_INIT;
    check(prt_model_tensor_get(model.get(), i, &info));
    load(model.get(), info);
  }
  check(prt_model_finalize(model.get()));
  return model;
}

prt_model_config tiny_config() {
  prt_model_config config = PRT_MODEL_CONFIG_INIT;
  config.n_layer = 2;
  config.h_q = 4;
  config.h_kv = 2;
  config.d_head = 16;
  config.d_model = 64;
  config.d_ff = 160;
  config.n_vocab = 300;
  config.max_position = 512;
  return config;
}

// The same numbers as in embed.c: vectors are norms and get ones, matrices get numbers in [-0.2, 0.2).
Model make_tiny_model(const prt_model_config& config) {
  return make_model(config, [state = uint64_t{1}](prt_model* model, const prt_tensor_info& info) mutable {
    std::vector<float> data(static_cast<size_t>(info.shape[0] * (info.n_dim > 1 ? info.shape[1] : 1)), 1.0f);
    for (float& x : data) {
      if (info.n_dim == 1) break;
      state = state * 6364136223846793005u + 1442695040888963407u;
      x = 0.2f * (static_cast<float>(static_cast<int32_t>(state >> 32)) / 2147483648.0f);
    }
    check(prt_model_load_tensor(model, info.name, data.data(), PRT_F32, info.shape, info.n_dim));
  });
}

// A structure of the interface has the same layout everywhere and says its own size; what an older file lacks keeps its default.
prt_model_config read_config(const std::filesystem::path& path) {
  prt_model_config config = PRT_MODEL_CONFIG_INIT;
  std::ifstream file(path, std::ios::binary);
  file.read(reinterpret_cast<char*>(&config), sizeof config);
  if (static_cast<uint32_t>(file.gcount()) != config.struct_size) throw std::runtime_error(path.string() + " is not a prt_model_config");
  return config;
}

// Read by the library straight into place.
Model read_model(const prt_model_config& config, const std::filesystem::path& folder) {
  return make_model(config, [&](prt_model* model, const prt_tensor_info& info) {
    const std::string path = (folder / (std::string(info.name) + ".bin")).u8string();
    check(prt_model_load_file(model, info.name, path.c_str(), 0, PRT_F32, info.shape, info.n_dim));
  });
}

std::vector<int32_t> generate(Model model, int32_t n_vocab, const std::vector<int32_t>& prompt, int32_t n_new) {
  prt_session_config session_config = PRT_SESSION_CONFIG_INIT;
  session_config.max_context = static_cast<int32_t>(prompt.size()) + n_new;
  const auto session = make<Session>(prt_session_create, model.get(), &session_config);
  prt_sampling greedy = PRT_SAMPLING_INIT;
  greedy.temperature = 0.0f;
  const auto sampler = make<Sampler>(prt_sampler_create, n_vocab, &greedy);

  Sequence sequence(session.get());
  std::vector<int32_t> written = {sequence.step(prompt, sampler.get())};
  while (static_cast<int32_t>(written.size()) < n_new) written.push_back(sequence.step({written.back()}, sampler.get()));
  return written;
}

int run(int argc, char** argv) {
  if (prt_abi_version() != PRT_ABI_VERSION) throw std::runtime_error("the library and the header have different ABI versions");
  std::vector<int32_t> prompt, written;
  if (argc == 1) {
    const prt_model_config config = tiny_config();
    for (int32_t i = 0; i < 70; ++i) prompt.push_back((i * i + 7) % config.n_vocab);
    written = generate(make_tiny_model(config), config.n_vocab, prompt, 24);
  } else if (argc > 3) {
    const std::filesystem::path folder = argv[1];
    const prt_model_config config = read_config(folder / "config.bin");
    for (int i = 3; i < argc; ++i) prompt.push_back(std::stoi(argv[i]));
    written = generate(read_model(config, folder), config.n_vocab, prompt, std::stoi(argv[2]));
  } else {
    std::cerr << "usage: " << argv[0] << " [FOLDER N_NEW TOKEN...]\n";
    return 2;
  }
  std::cout << "tokens:";
  for (const int32_t token : written) std::cout << ' ' << token;
  std::cout << '\n';
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
