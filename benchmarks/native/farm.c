/* A farm of WebSocket subscribers in one thread on epoll, cheap enough not to be what is measured.
 *
 * Each connection sends its handshake with a bearer token, then the subscription, and is ready when
 * `subscribed` came. Change frames are told from heartbeats by the first letter of their type;
 * pings are answered. With `ack` each subscriber is a backend of its own to the server: it says who
 * it is, and acks each revision once, as soon as it has read it; a frame of a revision that it
 * acked already, such as the C loop sends, is not acked again. Commands on stdin, one answer line
 * each on stdout:
 *
 *   GROW n      connect until n are ready         -> GROWN n seconds
 *   EXPECT      wait for one change frame each    -> EXPECTING, then, when all have it or after a
 *               limit: FRAME got first p50 p99 last cpu_ns, times in ns of CLOCK_MONOTONIC
 *   TIMES file  write every connection's time of the last frame, one a line  -> WRITTEN
 *   QUIT
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>
#ifdef WITH_TLS
#include <openssl/ssl.h>
static SSL_CTX *tls;
#endif

enum { CONNECTING, TLS_HANDSHAKE, HTTP_ANSWER, SUBSCRIBING, READY };
enum { IN_FLIGHT = 128, STDIN = 0xffffffff };
enum { REVISION_BYTES = 160 }; /* so far into a payload its revision has come */

/* Apart from the connections, which stay as small as those who only listen need them. */
typedef struct {
    uint64_t acked;
    char head[REVISION_BYTES + 1];
} Acker;

typedef struct {
    int fd;
    uint8_t state;
    uint8_t matched;      /* bytes of \r\n\r\n seen */
    uint8_t header_bytes; /* of the frame under way */
    uint8_t header[10];
    uint8_t head[16]; /* the payload's first bytes */
    uint64_t seen, length;
    uint64_t frame_ns;
#ifdef WITH_TLS
    SSL *ssl;
#endif
} Connection;

static Connection *connections;
static int started, ready, capacity, port, loop_fd, expecting;
static int got;
static Acker *ackers; /* one a connection; none where nobody acks */
static const char *token;
static char buffer[1 << 16];

static void fail(const char *what) {
    fprintf(stderr, "farm: %s: %s\n", what, strerror(errno));
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static uint64_t cpu_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static int by_value(const void *a, const void *b) {
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* The nearest rank: the lowest value that so many per cent of them do not exceed. */
static uint64_t percentile(const uint64_t *ordered, int count, int percent) {
    return ordered[(count * percent + 99) / 100 - 1];
}

static void watch(int i, uint32_t events, int operation) {
    struct epoll_event event = {.events = events, .data.u32 = i};
    if (epoll_ctl(loop_fd, operation, connections[i].fd, &event)) fail("epoll_ctl");
}

static void put(Connection *c, const void *data, int size) {
#ifdef WITH_TLS
    if (tls) {
        if (SSL_write(c->ssl, data, size) != size) fail("SSL_write");
        return;
    }
#endif
    if (send(c->fd, data, size, MSG_NOSIGNAL) != size) fail("send");
}

static int take(Connection *c) {
#ifdef WITH_TLS
    if (tls) {
        int size = SSL_read(c->ssl, buffer, sizeof buffer);
        if (size > 0) return size;
        int why = SSL_get_error(c->ssl, size);
        return why == SSL_ERROR_WANT_READ || why == SSL_ERROR_WANT_WRITE ? -1 : 0;
    }
#endif
    int size = recv(c->fd, buffer, sizeof buffer, 0);
    return size < 0 && errno == EAGAIN ? -1 : size < 0 ? 0 : size;
}

/* A client's frames are masked; a mask of zeros leaves the payload as it is. */
static void put_frame(Connection *c, int opcode, const char *payload, int size) {
    uint8_t frame[512] = {0x80 | opcode};
    int head = 2;
    if (size > (int)sizeof frame - 8) {
        fprintf(stderr, "farm: a payload of %d bytes\n", size);
        exit(1);
    }
    if (size > 125) {
        frame[1] = 0x80 | 126;
        frame[head++] = size >> 8;
        frame[head++] = size & 255;
    } else {
        frame[1] = 0x80 | size;
    }
    head += 4;
    memcpy(frame + head, payload, size);
    put(c, frame, head + size);
}

/* A hundred backends to a host; the instance tells them apart (docs/protocol.md section 4). */
static void subscribe(int i) {
    char message[256] = "{\"subscribe\": \"agent_config\"}";
    if (ackers)
        snprintf(message, sizeof message,
                 "{\"subscribe\":\"agent_config\",\"client\":{\"name\":\"bench-backend\","
                 "\"instance\":\"%012x\",\"version\":\"0.1.0\",\"host\":\"node-%d\",\"pid\":%d}}",
                 i, i / 100, 1000 + i % 100);
    put_frame(&connections[i], 1, message, strlen(message));
}

/* Acks the revision that the frame just read names, unless it was acked before. */
static void ack(Connection *c) {
    static const char name[] = "\"revision\":";
    Acker *acker = &ackers[c - connections];
    acker->head[c->length < REVISION_BYTES ? c->length : REVISION_BYTES] = 0;
    const char *revision = strstr(acker->head, name);
    if (!revision) {
        fprintf(stderr, "farm: no revision in %s\n", acker->head);
        exit(1);
    }
    uint64_t number = strtoull(revision + sizeof name - 1, NULL, 10);
    if (number <= acker->acked) return;
    acker->acked = number;
    char message[40];
    put_frame(c, 1, message, snprintf(message, sizeof message, "{\"ack\":%lu}", number));
}

static void start(int i) {
    Connection *c = &connections[i];
    memset(c, 0, sizeof *c);
    c->fd = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0);
    if (c->fd < 0) fail("socket");
    int one = 1;
    struct linger at_once = {1, 0}; /* a reset: nothing stays in TIME_WAIT */
    setsockopt(c->fd, SOL_SOCKET, SO_LINGER, &at_once, sizeof at_once);
    setsockopt(c->fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
    struct sockaddr_in to = {.sin_family = AF_INET, .sin_port = htons(port)};
    to.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    if (connect(c->fd, (void *)&to, sizeof to) && errno != EINPROGRESS) fail("connect");
    watch(i, EPOLLOUT, EPOLL_CTL_ADD);
}

static void ask(int i) {
    char request[1024];
    int size = snprintf(request, sizeof request,
                        "GET /ws HTTP/1.1\r\nHost: 127.0.0.1:%d\r\nUpgrade: websocket\r\n"
                        "Connection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
                        "Sec-WebSocket-Version: 13\r\nAuthorization: Bearer %s\r\n\r\n",
                        port, token);
    put(&connections[i], request, size);
    connections[i].state = HTTP_ANSWER;
    watch(i, EPOLLIN, EPOLL_CTL_MOD);
}

static void frame_done(Connection *c, uint64_t t) {
    int opcode = c->header[0] & 15;
    if (opcode == 9) {
        put_frame(c, 10, (char *)c->head, c->length < 16 ? (int)c->length : 16);
    } else if (opcode == 8) {
        fprintf(stderr, "farm: the server closed a connection: %d\n", c->head[0] << 8 | c->head[1]);
        exit(1);
    } else if (opcode == 1) {
        char kind = c->length > 9 ? c->head[9] : 0; /* {"type":"K */
        if (kind == 's' && c->state == SUBSCRIBING) {
            c->state = READY;
            ready++;
        } else if (kind == 'a' && expecting && !c->frame_ns) {
            c->frame_ns = t;
            got++;
        } else if (kind == 'e' || kind == 'r') {
            fprintf(stderr, "farm: not expected: %.16s\n", c->head);
            exit(1);
        }
        if (ackers && (kind == 's' || kind == 'a')) ack(c);
    }
    c->header_bytes = 0;
}

static void frames(Connection *c, const char *p, const char *end, uint64_t t) {
    while (p < end) {
        int small = c->header_bytes > 1 ? c->header[1] & 127 : 0;
        int whole = 2 + (small == 126 ? 2 : small == 127 ? 8 : 0);
        if (c->header_bytes < whole) {
            c->header[c->header_bytes++] = *p++;
            small = c->header_bytes > 1 ? c->header[1] & 127 : 0;
            whole = 2 + (small == 126 ? 2 : small == 127 ? 8 : 0);
            if (c->header_bytes < 2 || c->header_bytes < whole) continue;
            c->length = small < 126 ? (uint64_t)small : 0;
            for (int k = 2; k < whole; k++) c->length = c->length << 8 | c->header[k];
            c->seen = 0;
            if (!c->length) frame_done(c, t);
            continue;
        }
        uint64_t size = end - p;
        if (size > c->length - c->seen) size = c->length - c->seen;
        for (uint64_t k = 0; k < size && c->seen + k < sizeof c->head; k++) c->head[c->seen + k] = p[k];
        if (ackers && c->seen < REVISION_BYTES) {
            uint64_t left = REVISION_BYTES - c->seen;
            memcpy(ackers[c - connections].head + c->seen, p, size < left ? size : left);
        }
        c->seen += size;
        p += size;
        if (c->seen == c->length) frame_done(c, t);
    }
}

static void handle(int i) {
    Connection *c = &connections[i];
    if (c->state == CONNECTING) {
        int error = 0;
        socklen_t size = sizeof error;
        getsockopt(c->fd, SOL_SOCKET, SO_ERROR, &error, &size);
        if (error) {
            errno = error;
            fail("connect");
        }
#ifdef WITH_TLS
        if (tls) {
            c->ssl = SSL_new(tls);
            SSL_set_fd(c->ssl, c->fd);
            SSL_set_connect_state(c->ssl);
            c->state = TLS_HANDSHAKE;
        } else
#endif
        {
            ask(i);
            return;
        }
    }
#ifdef WITH_TLS
    if (c->state == TLS_HANDSHAKE) {
        int done = SSL_do_handshake(c->ssl);
        if (done == 1) {
            ask(i);
            return;
        }
        int why = SSL_get_error(c->ssl, done);
        if (why != SSL_ERROR_WANT_READ && why != SSL_ERROR_WANT_WRITE) fail("TLS handshake");
        watch(i, why == SSL_ERROR_WANT_READ ? EPOLLIN : EPOLLOUT, EPOLL_CTL_MOD);
        return;
    }
#endif
    int size = take(c);
    uint64_t t = now_ns();
    if (size < 0) return;
    if (size == 0) fail("a connection ended");
    const char *p = buffer, *end = buffer + size;
    if (c->state == HTTP_ANSWER) {
        if (!c->matched && (size < 12 || memcmp(buffer + 9, "101", 3))) {
            fprintf(stderr, "farm: refused: %.*s\n", size > 300 ? 300 : size, buffer);
            exit(1);
        }
        static const char blank[] = "\r\n\r\n";
        while (p < end && c->matched < 4) {
            c->matched = *p == blank[c->matched] ? c->matched + 1 : *p == '\r';
            p++;
        }
        if (c->matched < 4) return;
        c->state = SUBSCRIBING;
        subscribe(i);
    }
    frames(c, p, end, t);
}

/* Returns whether a command waits on stdin. */
static int pump(int timeout_ms) {
    struct epoll_event events[512];
    int command = 0, n = epoll_wait(loop_fd, events, 512, timeout_ms);
    for (int k = 0; k < n; k++) {
        if (events[k].data.u32 == STDIN)
            command = 1;
        else
            handle(events[k].data.u32);
    }
    return command;
}

static void grow(int target) {
    uint64_t begin = now_ns();
    while (ready < target) {
        while (started < target && started - ready < IN_FLIGHT) start(started++);
        pump(1000);
        if (now_ns() - begin > 120000000000ull) {
            fprintf(stderr, "farm: %d of %d connected in two minutes\n", ready, target);
            exit(1);
        }
    }
    printf("GROWN %d %.6f\n", ready, (now_ns() - begin) / 1e9);
}

static void expect(void) {
    for (int i = 0; i < started; i++) connections[i].frame_ns = 0;
    got = 0;
    expecting = 1;
    printf("EXPECTING\n");
    fflush(stdout);
    uint64_t begin = now_ns(), cpu = cpu_ns();
    while (got < started && now_ns() - begin < 30000000000ull) pump(100);
    cpu = cpu_ns() - cpu;
    expecting = 0;
    uint64_t *times = malloc(sizeof *times * (got + 1));
    int n = 0;
    for (int i = 0; i < started; i++)
        if (connections[i].frame_ns) times[n++] = connections[i].frame_ns;
    qsort(times, n, sizeof *times, by_value);
    if (n)
        printf("FRAME %d %lu %lu %lu %lu %lu\n", n, times[0], percentile(times, n, 50),
               percentile(times, n, 99), times[n - 1], cpu);
    else
        printf("FRAME 0 0 0 0 0 %lu\n", cpu);
    free(times);
}

int main(int argc, char **argv) {
    if (argc < 4) {
        fprintf(stderr, "farm PORT CAPACITY TOKEN-FILE [tls] [ack]\n");
        return 2;
    }
    port = atoi(argv[1]);
    capacity = atoi(argv[2]);
    static char secret[256];
    FILE *file = fopen(argv[3], "r");
    if (!file || !fgets(secret, sizeof secret, file)) fail(argv[3]);
    secret[strcspn(secret, "\r\n")] = 0;
    token = secret;
    for (int k = 4; k < argc; k++) {
        if (!strcmp(argv[k], "ack")) {
            ackers = calloc(capacity, sizeof *ackers);
            continue;
        }
#ifdef WITH_TLS
        tls = SSL_CTX_new(TLS_client_method());
        SSL_CTX_set_verify(tls, SSL_VERIFY_NONE, NULL);
        SSL_CTX_set_session_cache_mode(tls, SSL_SESS_CACHE_OFF);
        SSL_CTX_set_mode(tls, SSL_MODE_RELEASE_BUFFERS);
#else
        fprintf(stderr, "farm: compiled without OpenSSL\n");
        return 2;
#endif
    }
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    connections = calloc(capacity, sizeof *connections);
    loop_fd = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.u32 = STDIN};
    if (epoll_ctl(loop_fd, EPOLL_CTL_ADD, 0, &event)) fail("epoll_ctl");
    char line[512];
    setvbuf(stdin, NULL, _IONBF, 0); /* epoll sees what stdio has not read yet */
    for (;;) {
        if (!pump(1000)) continue;
        if (!fgets(line, sizeof line, stdin) || !strncmp(line, "QUIT", 4)) return 0;
        line[strcspn(line, "\n")] = 0;
        if (!strncmp(line, "GROW ", 5)) {
            int target = atoi(line + 5);
            if (target > capacity) return 2;
            grow(target);
        } else if (!strcmp(line, "EXPECT")) {
            expect();
        } else if (!strncmp(line, "TIMES ", 6)) {
            FILE *out = fopen(line + 6, "w");
            if (!out) fail(line + 6);
            for (int i = 0; i < started; i++) fprintf(out, "%lu\n", connections[i].frame_ns);
            fclose(out);
            printf("WRITTEN\n");
        }
        fflush(stdout);
    }
}
