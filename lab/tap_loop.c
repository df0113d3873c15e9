/* The least that moves frames through a TAP: one read or write after the other, into one buffer, and nothing else.
 *
 *   tap_loop read FD SIZE          until nothing is there
 *   tap_loop write FD SIZE COUNT   the frame on standard input, COUNT times
 *
 * FD is an inherited descriptor of a non-blocking TAP without IFF_VNET_HDR. Prints the frames and the seconds.
 */
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static double now(void)
{
    struct timespec at;
    clock_gettime(CLOCK_MONOTONIC, &at);
    return at.tv_sec + at.tv_nsec / 1e9;
}

int main(int argc, char **argv)
{
    static char frame[65536];
    if (argc < 4)
        return 2;
    int fd = atoi(argv[2]), size = atoi(argv[3]);
    long count = argc > 4 ? atol(argv[4]) : 0, done = 0;
    int writes = strcmp(argv[1], "write") == 0;
    if (writes && fread(frame, 1, size, stdin) != (size_t)size)
        return 2;
    double begin = now();
    if (writes)
        while (done < count && write(fd, frame, size) == size)
            done++;
    else
        while (read(fd, frame, size) > 0)
            done++;
    double end = now();
    if (writes ? done < count : errno != EAGAIN) {
        perror(argv[1]);
        return 1;
    }
    printf("%ld %.9f\n", done, end - begin);
    return 0;
}
