// The C entry point of joining parts: validate -> plan -> launch.
#include "combine_plan.h"
#include "cuda_status.h"
#include "device.h"
#include "fa3.h"
#include "validate.h"

namespace fa3 {
namespace {

fa3_status combine(const fa3_combine_params* params, cudaStream_t stream) {
  if (auto status = validate(params)) return status;
  const CombineArgs args = plan_combine(*params);
  if (args.count == 0) return FA3_OK;
  const DeviceScope scope(params->device);
  if (scope.status()) return scope.status();
  int num_sms = 0;
  if (auto status = hopper_sms(params->device, num_sms)) return status;
  return checked(launch_combine(args, params->out_dtype, stream), "combine");
}

}  // namespace
}  // namespace fa3

extern "C" int fa3_combine(const fa3_combine_params* params, void* stream) {
  fa3::clear_error();
  return fa3::combine(params, static_cast<cudaStream_t>(stream));
}
