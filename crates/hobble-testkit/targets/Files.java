/* Files DIR DESCRIPTORS
 *
 * The Java sibling of files.c: keeps DESCRIPTORS files open below DIR, reads, appends, writes and renames all the while in
 * two threads, next to a garbage collector and a compiler that have threads of their own.
 *
 * Commands: check, report, reset, tolerate 0|1, quit. */

import java.io.BufferedReader;
import java.io.IOException;
import java.io.InputStreamReader;
import java.io.RandomAccessFile;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.charset.StandardCharsets;
import java.nio.file.Path;
import java.nio.file.StandardCopyOption;
import java.nio.file.StandardOpenOption;
import java.util.ArrayList;
import java.util.Arrays;
import java.util.List;
import java.util.Random;
import java.util.concurrent.atomic.AtomicLong;

public class Files {
    static final int SIZE = 4096;
    static final List<String> errors = new ArrayList<>();
    static final AtomicLong operations = new AtomicLong();
    static final AtomicLong faults = new AtomicLong();
    static final AtomicLong longest = new AtomicLong();
    static volatile boolean tolerate;

    static void fail(String text) {
        synchronized (errors) {
            if (errors.size() < 24) {
                errors.add(text);
            }
        }
    }

    static void failed(String what, IOException error) {
        faults.incrementAndGet();
        if (!tolerate) {
            fail(what + ": " + error);
        }
    }

    static final class Slot {
        final int sort;
        final Path path;
        final byte[] content = new byte[SIZE];
        RandomAccessFile file;
        FileChannel channel;
        long position;
        long appended;

        Slot(Path directory, int number) throws IOException {
            sort = number % 3;
            path = directory.resolve("java-" + number);
            for (int i = 0; i < SIZE; i++) {
                content[i] = (byte) (number * 131 + i * 7 + 1);
            }
            if (sort == 0) {
                file = new RandomAccessFile(path.toFile(), "rw");
                file.write(content);
                file.seek(0);
            } else if (sort == 1) {
                channel = FileChannel.open(path, StandardOpenOption.CREATE, StandardOpenOption.APPEND);
            } else {
                channel = FileChannel.open(path, StandardOpenOption.CREATE, StandardOpenOption.READ, StandardOpenOption.WRITE);
                channel.write(ByteBuffer.wrap(content), 0);
            }
        }

        synchronized void step(Random random) throws IOException {
            operations.incrementAndGet();
            int offset = random.nextInt(SIZE);
            int length = 1 + random.nextInt(SIZE - offset);
            byte[] buffer = new byte[length];
            if (sort == 0) {
                int got = file.read(buffer);
                if (got < 0) {
                    if (position != SIZE) {
                        fail(path + ": end of file at " + position);
                    }
                    file.seek(0);
                    position = 0;
                } else {
                    compare(buffer, (int) position, got);
                    position += got;
                }
            } else if (sort == 1) {
                byte[] record = String.format("%015d\n", appended).getBytes(StandardCharsets.US_ASCII);
                if (channel.write(ByteBuffer.wrap(record)) != 16) {
                    fail(path + ": short append");
                }
                appended++;
            } else if (random.nextBoolean()) {
                if (channel.read(ByteBuffer.wrap(buffer), offset) != length) {
                    fail(path + ": short read");
                }
                compare(buffer, offset, length);
            } else {
                channel.write(ByteBuffer.wrap(content, offset, length), offset);
                if (random.nextInt(8) == 0) {
                    Path other = path.resolveSibling(path.getFileName() + ".renamed");
                    java.nio.file.Files.move(path, other, StandardCopyOption.ATOMIC_MOVE);
                    java.nio.file.Files.move(other, path, StandardCopyOption.ATOMIC_MOVE);
                }
            }
        }

        void compare(byte[] got, int offset, int length) {
            if (!Arrays.equals(got, 0, length, content, offset, offset + length)) {
                fail(path + ": wrong data at " + offset);
            }
        }

        synchronized void check() throws IOException {
            if (sort == 0) {
                if (file.getFilePointer() != position) {
                    fail(path + ": at " + file.getFilePointer() + ", must be at " + position);
                }
                if (file.length() != SIZE) {
                    fail(path + ": " + file.length() + " bytes");
                }
            } else if (sort == 1) {
                if (channel.size() != appended * 16) {
                    fail(path + ": " + channel.size() + " bytes, must be " + appended * 16);
                }
            } else {
                byte[] buffer = new byte[SIZE];
                channel.read(ByteBuffer.wrap(buffer), 0);
                compare(buffer, 0, SIZE);
            }
        }
    }

    static void daemon(Runnable body) {
        Thread thread = new Thread(body);
        thread.setDaemon(true);
        thread.start();
    }

    static void nap() {
        try {
            Thread.sleep(0, 500_000);
        } catch (InterruptedException error) {
            fail("interrupted");
        }
    }

    static String quote(String text) {
        StringBuilder out = new StringBuilder("\"");
        for (char c : text.toCharArray()) {
            out.append(c < 32 || c > 126 || c == '"' || c == '\\' ? String.format("\\u%04x", (int) c) : String.valueOf(c));
        }
        return out.append('"').toString();
    }

    public static void main(String[] arguments) throws IOException {
        Path directory = Path.of(arguments[0]);
        Slot[] slots = new Slot[Integer.parseInt(arguments[1])];
        for (int i = 0; i < slots.length; i++) {
            slots[i] = new Slot(directory, i);
        }
        for (int worker = 0; worker < 2; worker++) {
            Random random = new Random(worker);
            daemon(() -> {
                while (true) {
                    Slot slot = slots[random.nextInt(slots.length)];
                    try {
                        slot.step(random);
                    } catch (IOException error) {
                        failed(slot.path.toString(), error);
                    }
                    nap();
                }
            });
        }
        daemon(() -> {
            long last = System.nanoTime();
            while (true) {
                nap();
                long now = System.nanoTime();
                longest.accumulateAndGet((now - last) / 1000, Math::max);
                last = now;
            }
        });
        System.out.println("{\"ready\":true,\"pids\":[" + ProcessHandle.current().pid() + "]}");
        BufferedReader input = new BufferedReader(new InputStreamReader(System.in));
        for (String line; (line = input.readLine()) != null; ) {
            boolean quit = line.equals("quit");
            if (line.equals("check") || quit) {
                for (Slot slot : slots) {
                    try {
                        slot.check();
                    } catch (IOException error) {
                        failed(slot.path.toString(), error);
                    }
                }
            } else if (line.equals("reset")) {
                longest.set(0);
            } else if (line.startsWith("tolerate ")) {
                tolerate = line.endsWith("1");
            }
            StringBuilder list = new StringBuilder();
            synchronized (errors) {
                for (String error : errors) {
                    list.append(list.length() == 0 ? "" : ",").append(quote(error));
                }
            }
            System.out.println("{\"errors\":[" + list + "],\"operations\":" + operations + ",\"faults\":" + faults + ",\"gap_us\":"
                    + longest + "}");
            if (quit) {
                Runtime.getRuntime().halt(0);
            }
        }
    }
}
