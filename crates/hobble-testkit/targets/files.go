// files DIR DESCRIPTORS
//
// The Go sibling of files.c: keeps DESCRIPTORS files open below DIR, reads, appends, writes and renames all the while in
// goroutines, which the Go scheduler moves between threads and preempts by signals.
//
// Commands: check, report, reset, tolerate 0|1, quit.
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"math/rand"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const size = 4096

var (
	errorsLock sync.Mutex
	found      = []string{}
	tolerate   atomic.Bool
	faults     atomic.Int64
	operations atomic.Int64
	longest    atomic.Int64
)

func fail(format string, arguments ...any) {
	errorsLock.Lock()
	defer errorsLock.Unlock()
	if len(found) < 24 {
		found = append(found, fmt.Sprintf(format, arguments...))
	}
}

func failed(err error) {
	faults.Add(1)
	if !tolerate.Load() {
		fail("%v", err)
	}
}

type slot struct {
	lock     sync.Mutex
	sort     int
	path     string
	file     *os.File
	content  []byte
	position int64
	appended int64
	flags    [2]uintptr
	inode    uint64
}

func fcntl(file *os.File, command uintptr) uintptr {
	// Not through File.Fd(): that would make the descriptor blocking.
	var result uintptr
	raw, err := file.SyscallConn()
	if err != nil {
		fail("%v", err)
		return 0
	}
	raw.Control(func(fd uintptr) { result, _, _ = syscall.Syscall(syscall.SYS_FCNTL, fd, command, 0) })
	return result
}

func (s *slot) facts() ([2]uintptr, uint64, int64) {
	info, err := s.file.Stat()
	if err != nil {
		failed(err)
		return s.flags, s.inode, s.appended * 16
	}
	return [2]uintptr{fcntl(s.file, syscall.F_GETFL), fcntl(s.file, syscall.F_GETFD)}, info.Sys().(*syscall.Stat_t).Ino, info.Size()
}

func newSlot(directory string, number int) *slot {
	s := &slot{sort: number % 4, path: filepath.Join(directory, fmt.Sprintf("go-%d", number))}
	flags := os.O_RDWR | os.O_CREATE
	if s.sort == 2 {
		flags |= os.O_APPEND
	}
	file, err := os.OpenFile(s.path, flags, 0o644)
	if err != nil {
		panic(err)
	}
	s.file = file
	s.content = make([]byte, size)
	for i := range s.content {
		s.content[i] = byte(number*131 + i*7 + 1)
	}
	if s.sort != 2 {
		if _, err := file.WriteAt(s.content, 0); err != nil {
			panic(err)
		}
	}
	if s.sort == 3 {
		os.Remove(s.path)
	}
	s.flags, s.inode, _ = s.facts()
	return s
}

func (s *slot) step(random *rand.Rand) {
	s.lock.Lock()
	defer s.lock.Unlock()
	operations.Add(1)
	offset := random.Intn(size)
	length := 1 + random.Intn(size-offset)
	buffer := make([]byte, length)
	switch s.sort {
	case 0: // moves the description's offset
		n, err := s.file.Read(buffer)
		if err == io.EOF {
			if s.position != size {
				fail("%s: end of file at %d", s.path, s.position)
			}
			if _, err := s.file.Seek(0, io.SeekStart); err != nil {
				failed(err)
			} else {
				s.position = 0
			}
		} else if err != nil {
			failed(err)
		} else {
			if !bytes.Equal(buffer[:n], s.content[s.position:s.position+int64(n)]) {
				fail("%s: wrong data at %d", s.path, s.position)
			}
			s.position += int64(n)
		}
	case 2:
		if _, err := s.file.Write([]byte(fmt.Sprintf("%015d\n", s.appended))); err != nil {
			failed(err)
		} else {
			s.appended++
		}
	case 1:
		if random.Intn(8) == 0 {
			other := s.path + ".renamed"
			if err := os.Rename(s.path, other); err != nil {
				failed(err)
			} else if err := os.Rename(other, s.path); err != nil {
				failed(err)
			}
		}
		fallthrough
	default:
		if random.Intn(2) == 0 {
			if _, err := s.file.WriteAt(s.content[offset:offset+length], int64(offset)); err != nil {
				failed(err)
			}
		} else if _, err := s.file.ReadAt(buffer, int64(offset)); err != nil {
			failed(err)
		} else if !bytes.Equal(buffer, s.content[offset:offset+length]) {
			fail("%s: wrong data at %d", s.path, offset)
		}
	}
}

func (s *slot) check() {
	s.lock.Lock()
	defer s.lock.Unlock()
	flags, inode, length := s.facts()
	if flags != s.flags {
		fail("%s: flags %v, were %v", s.path, flags, s.flags)
	}
	if inode != s.inode {
		fail("%s: inode %d, was %d", s.path, inode, s.inode)
	}
	if s.sort == 2 {
		if length != s.appended*16 {
			fail("%s: %d bytes, must be %d", s.path, length, s.appended*16)
		}
		return
	}
	buffer := make([]byte, size)
	if _, err := s.file.ReadAt(buffer, 0); err != nil {
		failed(err)
	} else if !bytes.Equal(buffer, s.content) {
		fail("%s: wrong data", s.path)
	}
	if position, err := s.file.Seek(0, io.SeekCurrent); err != nil {
		failed(err)
	} else if position != s.position {
		fail("%s: at %d, must be at %d", s.path, position, s.position)
	}
}

func main() {
	count, err := strconv.Atoi(os.Args[2])
	if err != nil {
		panic(err)
	}
	var limit syscall.Rlimit
	syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit)
	limit.Cur = limit.Max
	syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit)
	slots := make([]*slot, count)
	for i := range slots {
		slots[i] = newSlot(os.Args[1], i)
	}
	for worker := 0; worker < 4; worker++ {
		random := rand.New(rand.NewSource(int64(worker)))
		go func() {
			for {
				slots[random.Intn(count)].step(random)
				time.Sleep(100 * time.Microsecond)
			}
		}()
	}
	go func() {
		last := time.Now()
		for {
			time.Sleep(300 * time.Microsecond)
			now := time.Now()
			if gap := now.Sub(last).Microseconds(); gap > longest.Load() {
				longest.Store(gap)
			}
			last = now
		}
	}()
	answers := json.NewEncoder(os.Stdout)
	answers.Encode(map[string]any{"ready": true, "pids": []int{os.Getpid()}})
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		command := strings.Fields(lines.Text())
		switch command[0] {
		case "check", "quit":
			for _, s := range slots {
				s.check()
			}
		case "reset":
			longest.Store(0)
		case "tolerate":
			tolerate.Store(command[1] == "1")
		}
		errorsLock.Lock()
		answers.Encode(map[string]any{"errors": found, "operations": operations.Load(), "faults": faults.Load(), "gap_us": longest.Load()})
		errorsLock.Unlock()
		if command[0] == "quit" {
			return
		}
	}
}
