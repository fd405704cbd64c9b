/* The floor that a broadcast is held against: one send() a socket, in C, of bytes made before. */
#define _GNU_SOURCE
#include <sys/socket.h>

/* Returns how many sockets did not take the whole frame. */
int send_to_all(const int *sockets, int count, const void *frame, long size) {
    int refused = 0;
    for (int i = 0; i < count; i++)
        if (send(sockets[i], frame, size, MSG_DONTWAIT | MSG_NOSIGNAL) != size) refused++;
    return refused;
}
