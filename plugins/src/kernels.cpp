#include "table.h"

#include <algorithm>

namespace jet {
#include "kernels.inc"
}
