#pragma once
#include "fa3.h"

namespace fa3 {

/// Every rule on the arguments of a forward call that the host can check without reading device memory.
fa3_status validate(const fa3_forward_params* params);
/// The same of a backward call.
fa3_status validate(const fa3_backward_params* params);
/// The same of a call that quantises.
fa3_status validate(const fa3_quantize_params* params);
/// The same of a call that joins parts.
fa3_status validate(const fa3_combine_params* params);
/// How many multiprocessors a device may be said to have.
fa3_status check_num_sms(int num_sms);
/// What a caller gives as workspace, if it gives one.
fa3_status check_workspace(const void* workspace);

}  // namespace fa3
