// src/arch/integers.cuh on the emulated GPU: as on a single lane.
#pragma once
#include "../../lane/arch/integers.cuh"
