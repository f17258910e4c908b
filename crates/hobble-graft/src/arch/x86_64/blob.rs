//! The code that runs inside a borrowed thread, and the data that lies behind it.
//!
//! Owns the machine code and the layout of its data area. Invariants: it is position independent, touches no stack and no
//! floating-point register, contains no trap, and every way through it that the tracer does not cut short ends in
//! `restore`, which puts the thread back where it was.
//!
//! Reading on from any system call is always right: after `entry_one` comes `restore`; the batch interpreter ends in a
//! blocking read whose end of file, time-out or failure leads to `restore` too. Only the tracer, stopping the thread,
//! prevents that. `restore` runs the clean-up table, unmaps the scratch mapping, loads the flags (`popfq` from the data area;
//! it reads memory below no one's stack because signals are blocked), then the stack pointer, and only then
//! unblocks signals: from there on the thread's own stack is in place, a signal frame lands where it would have landed
//! natively, and only `mov` and `jrcxz` follow, which leave the flags alone. System calls keep the flags
//! (arch/x86/entry/entry_64.S saves them in r11 and restores them).

#![allow(unsafe_code)]

use super::Registers;
use crate::arch::Ending;

core::arch::global_asm!(
    r#"
    .pushsection .rodata.hobble_blob, "a", @progbits
    .balign 16
    .globl hobble_blob_start
    .hidden hobble_blob_start
hobble_blob_start:
.Lentry_one:
    syscall
.Lone_return:
    jmp .Lrestore

.Lentry_batch:
    # rbx: the scratch header; r12, r13: the table; r15: 0 while batches are run, 1 in the clean-up.
    mov rbx, [rip + .Ldata + 160]
    xor r15d, r15d
.Lnew_table:
    mov r12, [rbx + 16]
    mov r13, [rbx + 24]
.Lnext:
    cmp r12, r13
    jae .Ltable_end
    mov eax, [r12]
    mov ebp, [r12 + 4]
    mov rdi, [r12 + 8]
    mov rsi, [r12 + 16]
    mov rdx, [r12 + 24]
    mov r10, [r12 + 32]
    mov r8, [r12 + 40]
    mov r9, [r12 + 48]
    test bpl, 1
    jz .Lno_cell_1
    mov r14, rdi
    movsxd rdi, dword ptr [r14]
    test bpl, 2
    jz .Lno_cell_1
    mov dword ptr [r14], -1
.Lno_cell_1:
    test bpl, 8
    jz .Lcall
    movsxd r8, dword ptr [r8]
.Lcall:
    # A cell that holds -1 has nothing to close: skipping it spares the call.
    test bpl, 2
    jz .Lsyscall
    test edi, edi
    js .Lskip
.Lsyscall:
    syscall
    mov [r12 + 56], rax
    add r12, 64
    test bpl, 16
    jz .Lnot_zero
    test rax, rax
    jz .Ltable_end
.Lnot_zero:
    test bpl, 4
    jz .Lnext
    cmp rax, -4095
    jb .Lnext
    jmp .Ltable_end
.Lskip:
    mov qword ptr [r12 + 56], 0
    add r12, 64
    jmp .Lnext
.Ltable_end:
    test r15d, r15d
    jnz .Lcleaned
    mov [rbx + 8], r12
    # sendto(socket, &byte, 1, MSG_NOSIGNAL | MSG_DONTWAIT, NULL, 0): no SIGPIPE may be left pending.
    mov eax, 44
    mov edi, [rbx + 48]
    lea rsi, [rbx + 32]
    mov edx, 1
    mov r10d, 0x4040
    xor r8d, r8d
    xor r9d, r9d
    syscall
.Lwait:
    # read(socket, &byte, 1); SO_RCVTIMEO bounds it.
    xor eax, eax
    mov edi, [rbx + 48]
    lea rsi, [rbx + 40]
    mov edx, 1
    syscall
    cmp rax, -4
    je .Lwait
    cmp rax, 1
    jne .Lrestore
    # A byte that came with descriptors which no call received is no order.
    cmp byte ptr [rbx + 40], 1
    jne .Lwait
    jmp .Lnew_table

.Lrestore:
    mov r15d, 1
    mov r12, [rip + .Ldata + 176]
    mov r13, [rip + .Ldata + 184]
    jmp .Lnext
.Lcleaned:
    mov rsi, [rip + .Ldata + 168]
    test rsi, rsi
    jz .Lunmapped
    mov rdi, [rip + .Ldata + 160]
    mov eax, 11
    syscall
.Lunmapped:
    lea rsp, [rip + .Ldata + 136]
    popfq
    mov rsp, [rip + .Ldata + 120]
    # rt_sigprocmask(SIG_SETMASK, &mask, NULL, 8), unless the data say that there is no mask to set.
    mov rcx, [rip + .Ldata + 152]
    jrcxz .Lregisters
    mov eax, 14
    mov edi, 2
    lea rsi, [rip + .Ldata + 144]
    mov edx, 0
    mov r10d, 8
    syscall
.Lregisters:
    mov rax, [rip + .Ldata]
    mov rbx, [rip + .Ldata + 8]
    mov rcx, [rip + .Ldata + 16]
    mov rdx, [rip + .Ldata + 24]
    mov rsi, [rip + .Ldata + 32]
    mov rdi, [rip + .Ldata + 40]
    mov rbp, [rip + .Ldata + 48]
    mov r8, [rip + .Ldata + 56]
    mov r9, [rip + .Ldata + 64]
    mov r10, [rip + .Ldata + 72]
    mov r11, [rip + .Ldata + 80]
    mov r12, [rip + .Ldata + 88]
    mov r13, [rip + .Ldata + 96]
    mov r14, [rip + .Ldata + 104]
    mov r15, [rip + .Ldata + 112]
    jmp [rip + .Ldata + 128]
    .balign 8
    .globl hobble_blob_data
    .hidden hobble_blob_data
.Ldata:
hobble_blob_data:
    .fill 192, 1, 0
    .globl hobble_blob_end
    .hidden hobble_blob_end
hobble_blob_end:
    .balign 4
    .globl hobble_blob_layout
    .hidden hobble_blob_layout
hobble_blob_layout:
    .long .Lentry_one - hobble_blob_start
    .long .Lone_return - hobble_blob_start
    .long .Lentry_batch - hobble_blob_start
    .long .Lunmapped - hobble_blob_start
    .popsection
"#
);

unsafe extern "C" {
    static hobble_blob_start: u8;
    static hobble_blob_data: u8;
    static hobble_blob_end: u8;
    static hobble_blob_layout: [u32; 4];
}

/// The code and its data area, ready to be written to one address of a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Image {
    bytes: Vec<u8>,
    data: usize,
    layout: [u32; 4],
}

impl Image {
    /// The code with an empty data area.
    pub(crate) fn new() -> Self {
        let start = &raw const hobble_blob_start;
        let data = (&raw const hobble_blob_data).addr() - start.addr();
        let length = (&raw const hobble_blob_end).addr() - start.addr();
        // SAFETY: the assembler defines start and end around one run of initialised read-only bytes.
        let code = unsafe { core::slice::from_raw_parts(start, length) };
        // SAFETY: the assembler defines four 32-bit words there; nobody writes them.
        let layout = unsafe { hobble_blob_layout };
        Self {
            bytes: code.to_vec(),
            data,
            layout,
        }
    }

    /// What is written to the target.
    pub(crate) fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    /// Where the data area begins: what lies before it is the same in every target.
    pub(crate) fn data_offset(&self) -> u64 {
        self.data as u64
    }

    /// The data area.
    pub(crate) fn data(&self) -> &[u8] {
        self.bytes.get(self.data..).unwrap_or_default()
    }

    /// Offset of `entry_one`: a system call with the registers as they are.
    pub(crate) fn entry_one(&self) -> u64 {
        self.layout[0].into()
    }

    /// Offset of the instruction after the system call of `entry_one`.
    pub(crate) fn one_return(&self) -> u64 {
        self.layout[1].into()
    }

    /// Offset of `entry_batch`.
    pub(crate) fn entry_batch(&self) -> u64 {
        self.layout[2].into()
    }

    /// Whether a thread at this offset has passed the point from which on it resumes by itself.
    pub(crate) fn is_leaving(&self, offset: u64) -> bool {
        (u64::from(self.layout[3])..self.data as u64).contains(&offset)
    }

    /// Sets what `restore` loads: the registers to resume with and what to clean up before.
    pub(crate) fn set_ending(&mut self, resume: &Registers, ending: &Ending) {
        let r = resume.raw();
        let words = [
            r.rax,
            r.rbx,
            r.rcx,
            r.rdx,
            r.rsi,
            r.rdi,
            r.rbp,
            r.r8,
            r.r9,
            r.r10,
            r.r11,
            r.r12,
            r.r13,
            r.r14,
            r.r15,
            r.rsp,
            r.rip,
            r.eflags,
            ending.mask.unwrap_or(0),
            u64::from(ending.mask.is_some()),
            ending.scratch.0,
            ending.scratch.1,
            ending.cleanup.0,
            ending.cleanup.1,
        ];
        let area = self.bytes.get_mut(self.data..).unwrap_or_default();
        for (slot, word) in area.chunks_exact_mut(8).zip(words) {
            slot.copy_from_slice(&word.to_le_bytes());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fits_into_the_padding_of_a_vdso_and_holds_no_trap_nor_stack_use() {
        let image = Image::new();
        assert_eq!(image.data().len(), 192);
        assert!(image.bytes().len() < 768, "{} bytes", image.bytes().len());
        let code = &image.bytes()[..image.data];
        // int3 is 0xcc, int n is 0xcd; neither byte occurs in an encoding used here, not even as an operand.
        assert!(!code.contains(&0xcc) && !code.contains(&0xcd));
        assert_eq!(
            &code[..2],
            &[0x0f, 0x05],
            "entry_one is the syscall instruction"
        );
    }

    #[test]
    fn data_area_is_written_where_the_code_reads_it() {
        let mut image = Image::new();
        let mut registers = Registers::default();
        registers.set_ip(0x1122_3344_5566_7788);
        image.set_ending(
            &registers,
            &Ending {
                mask: Some(7),
                scratch: (0x1000, 0x2000),
                cleanup: (0x3000, 0x4000),
            },
        );
        let word = |at: usize| u64::from_le_bytes(image.data()[at..at + 8].try_into().unwrap());
        assert_eq!(word(128), 0x1122_3344_5566_7788);
        assert_eq!(
            [
                word(144),
                word(152),
                word(160),
                word(168),
                word(176),
                word(184)
            ],
            [7, 1, 0x1000, 0x2000, 0x3000, 0x4000]
        );
    }
}
