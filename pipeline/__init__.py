"""TIME: frames, clocks, threads and sockets, from the cameras to the published fused video."""

import os

# OpenCV reads this when it is first imported: a small file that unpacks to gigabytes is refused before it is decoded.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 25))
