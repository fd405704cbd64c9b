/* HTTP load over kept connections, in one thread on epoll: as fast as it goes, or at a fixed rate.
 *
 *   load PORT TOKEN-FILE PATH CONNECTIONS SECONDS RATE SAMPLES-FILE [HEADER...]
 *
 * RATE 0: each connection sends its next request when the last was answered. Otherwise RATE
 * requests a second in all, at times fixed beforehand; a request that has to wait for its
 * connection counts from when it was due, so that a stalled server is not let off.
 * Prints: requests seconds p50_ms p90_ms p99_ms max_ms bytes_an_answer and the count of each class
 * of status 2xx 3xx other. SAMPLES-FILE (- for none) gets "due_ns end_ns" a line.
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

typedef struct {
    int fd, busy;
    uint64_t due, next_due;
    char head[8192];
    int head_size;
    long body_left; /* -1: the head is not complete */
} Connection;

typedef struct {
    uint64_t due, end;
} Sample;

static Sample *samples;
static long taken, room, bytes, by_class[3];

static void fail(const char *what) {
    fprintf(stderr, "load: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The nearest rank: the lowest value that so many per cent of them do not exceed. */
static double percentile_ms(const uint64_t *ordered, long count, int percent) {
    return ordered[(count * percent + 99) / 100 - 1] / 1e6;
}

static void answered(Connection *c, uint64_t t) {
    if (taken == room) samples = realloc(samples, sizeof *samples * (room = room ? 2 * room : 65536));
    samples[taken++] = (Sample){c->due, t};
    char class = c->head[9];
    by_class[class == '2' ? 0 : class == '3' ? 1 : 2]++;
    c->busy = 0;
    c->head_size = 0;
    c->body_left = -1;
}

static void take(Connection *c) {
    static char buffer[1 << 20];
    ssize_t size = recv(c->fd, buffer, sizeof buffer, 0);
    if (size < 0 && errno == EAGAIN) return;
    if (size <= 0) fail("a connection ended");
    bytes += size;
    const char *p = buffer;
    if (c->body_left < 0) {
        int part = size < (ssize_t)sizeof c->head - 1 - c->head_size ? size : (int)sizeof c->head - 1 - c->head_size;
        memcpy(c->head + c->head_size, p, part);
        c->head_size += part;
        c->head[c->head_size] = 0;
        char *blank = strstr(c->head, "\r\n\r\n");
        if (!blank) return;
        long head_bytes = blank + 4 - c->head;
        const char *length = strcasestr(c->head, "\r\ncontent-length:");
        c->body_left = length && length < blank ? atol(length + 17) : 0;
        c->body_left -= c->head_size - head_bytes; /* what came with the head */
        c->body_left -= size - part;
    } else {
        c->body_left -= size;
    }
    if (c->body_left <= 0) answered(c, now_ns());
}

int main(int argc, char **argv) {
    if (argc < 8) {
        fprintf(stderr, "load PORT TOKEN-FILE PATH CONNECTIONS SECONDS RATE SAMPLES-FILE [HEADER...]\n");
        return 2;
    }
    int port = atoi(argv[1]), count = atoi(argv[4]);
    double seconds = atof(argv[5]), rate = atof(argv[6]);
    char token[256] = "", request[4096];
    FILE *file = fopen(argv[2], "r");
    if (!file || !fgets(token, sizeof token, file)) fail(argv[2]);
    token[strcspn(token, "\r\n")] = 0;
    int size = snprintf(request, sizeof request, "GET %s HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nAuthorization: Bearer %s\r\n", argv[3], port, token);
    for (int i = 8; i < argc; i++) size += snprintf(request + size, sizeof request - size, "%s\r\n", argv[i]);
    size += snprintf(request + size, sizeof request - size, "\r\n");
    Connection *all = calloc(count, sizeof *all);
    int loop_fd = epoll_create1(0), one = 1;
    for (int i = 0; i < count; i++) {
        struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
        to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
        all[i].fd = socket(AF_INET, SOCK_STREAM, 0);
        if (connect(all[i].fd, (void *)&to, sizeof to)) fail("connect");
        setsockopt(all[i].fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
        all[i].body_left = -1;
        struct epoll_event event = {.events = EPOLLIN, .data.u32 = i};
        epoll_ctl(loop_fd, EPOLL_CTL_ADD, all[i].fd, &event);
    }
    uint64_t begin = now_ns(), stop = begin + (uint64_t)(seconds * 1e9);
    uint64_t period = rate > 0 ? (uint64_t)(1e9 * count / rate) : 0;
    for (int i = 0; i < count; i++) all[i].next_due = begin + (period ? period * i / count : 0);
    for (;;) {
        uint64_t t = now_ns(), soonest = stop;
        int busy = 0;
        for (int i = 0; i < count; i++) {
            Connection *c = &all[i];
            if (!c->busy && t < stop && c->next_due <= t) {
                c->due = period ? c->next_due : t;
                if (period) c->next_due += period;
                c->busy = 1;
                if (send(c->fd, request, size, MSG_NOSIGNAL) != size) fail("send");
            }
            busy += c->busy;
            if (!c->busy && c->next_due < soonest) soonest = c->next_due;
        }
        if (t >= stop && !busy) break;
        if (t > stop + 30000000000ull) {
            fprintf(stderr, "load: no answer in 30 seconds\n");
            return 1;
        }
        struct epoll_event events[256];
        struct timespec wait = {1, 0};
        if (busy < count && t < stop) {
            uint64_t left = soonest > t ? soonest - t : 0;
            wait = (struct timespec){left / 1000000000ull, left % 1000000000ull};
        }
        int n = epoll_pwait2(loop_fd, events, 256, &wait, NULL);
        for (int k = 0; k < n; k++) take(&all[events[k].data.u32]);
    }
    double elapsed = (now_ns() - begin) / 1e9;
    if (strcmp(argv[7], "-")) {
        FILE *out = fopen(argv[7], "w");
        if (!out) fail(argv[7]);
        for (long i = 0; i < taken; i++) fprintf(out, "%lu %lu\n", samples[i].due, samples[i].end);
        fclose(out);
    }
    uint64_t *took = malloc(sizeof *took * (taken + 1));
    for (long i = 0; i < taken; i++) took[i] = samples[i].end - samples[i].due;
    qsort(took, taken, sizeof *took, by_value);
    if (!taken) fail("nothing was answered");
    printf("%ld %.6f %.4f %.4f %.4f %.4f %ld %ld %ld %ld\n", taken, elapsed,
           percentile_ms(took, taken, 50), percentile_ms(took, taken, 90),
           percentile_ms(took, taken, 99), percentile_ms(took, taken, 100), bytes / taken, by_class[0], by_class[1], by_class[2]);
    return 0;
}
