"""TIME: frames, clocks, threads and sockets, from the cameras to the published fused video."""
