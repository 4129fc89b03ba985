#pragma once
#include "fa3.h"

namespace fa3 {

/// Makes a device current for as long as it lives, and puts the caller's back.
class DeviceScope {
 public:
  explicit DeviceScope(int device);
  ~DeviceScope();
  DeviceScope(const DeviceScope&) = delete;
  DeviceScope& operator=(const DeviceScope&) = delete;
  fa3_status status() const { return status_; }

 private:
  int previous_ = -1;
  fa3_status status_ = FA3_OK;
};

/// Multiprocessors of a device that fa3's kernels run on; FA3_ERROR_DEVICE if they do not.
fa3_status hopper_sms(int device, int& num_sms);

}  // namespace fa3
