// DotProduct (panel_isa.h) for 1 to 12 rows and one panel, or 1 to 6 rows and two: 24 sums, with
// weights and x in the other eight vector registers. In assembly because every register counts:
// 12 addresses of rows, one of weights, one to fetch from and the place in a row leave only the
// stack's. GCC 12 keeps some of them in vector registers, and moving them back waits behind the dot
// products in the same queue: 140 cycles lost between two products where this loses 80.
//
// void kernel_<panels>_<lines fetched>_<rows>(const DotProduct&), System V ABI.

	.intel_syntax noprefix
	.altmacro

// What a DotProduct holds where.
	.set panel_0, 0
	.set panel_1, 8
	.set x, 16
	.set y, 24
	.set products, 32
	.set row_bytes, 40
	.set piece_bytes, 48
	.set piece_gap, 56
	.set panel_offset, 64
	.set adds, 72
	.set prefetch, 80
	.set prefetch_panel, 88
	.set prefetch_rate, 96
	.set prefetch_bytes, 104
	.set prefetch_gap, 112
	.set prefetch_x, 120
	.set x_rate, 128

// On the stack: the arguments, what the innermost loop reads of them, and how far the others are.
	.set arguments, 0
	.set rate, 8
	.set piece_end, 16
	.set next_x, 24
	.set next_y, 32
	.set products_left, 40
	.set next_prefetch, 48
	.set this_prefetch, 56
	.set rate_of_x, 64
	.set frame, 72

// Registers: rdi what to fetch, r15 weights, rbp bytes of a row behind us; of two panels r14 from the
// first to the second, and r13 from what to fetch of the one to that of the other, r12 what to fetch
// of x and r11 how far it goes on; of one r14 what to fetch of x, but for 12 rows.

// action reg, row: for each row, with the register for its x.
	.macro each_row rows, action
	.set row, 0
	.irp reg, rax, rbx, rcx, rdx, rsi, r8, r9, r10, r11, r12, r13, r14
	.if row < \rows
	\action	\reg, %row
	.endif
	.set row, row + 1
	.endr
	.endm

	.macro load_x reg, row
	mov	\reg, [rdi + 8*\row]
	.endm

// A row's next pair of steps.
	.macro dots_1 reg, row
	dots_1_in \reg, %(26 + \row % 6), %(2*\row), %(2*\row + 1)
	.endm
	.macro dots_1_in reg, pair, sum0, sum1
	vpbroadcastd zmm\pair, dword ptr [\reg + rbp]
	vdpbf16ps zmm\sum0, zmm\pair, zmm24
	vdpbf16ps zmm\sum1, zmm\pair, zmm25
	.endm
	.macro dots_2 reg, row
	dots_2_in \reg, %(28 + \row % 4), %(4*\row), %(4*\row + 1), %(4*\row + 2), %(4*\row + 3)
	.endm
	.macro dots_2_in reg, pair, sum0, sum1, sum2, sum3
	dots_1_in \reg, \pair, \sum0, \sum1
	vdpbf16ps zmm\sum2, zmm\pair, zmm26
	vdpbf16ps zmm\sum3, zmm\pair, zmm27
	.endm

	.macro clear_sums count
	.set sum, 0
	.rept \count
	clear_sum %sum
	.set sum, sum + 1
	.endr
	.endm
	.macro clear_sum sum
	vpxord	zmm\sum, zmm\sum, zmm\sum
	.endm

// Sums to the rows of y that rdi lists; rcx from panel to panel.
	.macro finish rows, panels, action
	.set row, 0
	.rept \rows
	mov	rax, [rdi + 8*row]
	.if \panels == 1
	\action	rax, %(2*row), %(2*row + 1)
	.else
	\action	rax, %(4*row), %(4*row + 1)
	add	rax, rcx
	\action	rax, %(4*row + 2), %(4*row + 3)
	.endif
	.set row, row + 1
	.endr
	.endm
	.macro add_to to, sum0, sum1
	vaddps	zmm\sum0, zmm\sum0, [\to]
	vaddps	zmm\sum1, zmm\sum1, [\to + 64]
	put_in	\to, \sum0, \sum1
	.endm
	.macro put_in to, sum0, sum1
	vmovups	[\to], zmm\sum0
	vmovups	[\to + 64], zmm\sum1
	.endm

	.macro keep argument, place
	mov	rax, [rdi + \argument]
	mov	[rsp + \place], rax
	.endm
	.macro save reg
	push	\reg
	.cfi_adjust_cfa_offset 8
	.cfi_rel_offset \reg, 0
	.endm
	.macro restore reg
	pop	\reg
	.cfi_adjust_cfa_offset -8
	.cfi_restore \reg
	.endm

	.macro kernel panels, lines, rows
	.p2align 5
	.type	kernel_\panels\()_\lines\()_\rows, @function
kernel_\panels\()_\lines\()_\rows:
	.cfi_startproc
	save	rbp
	save	rbx
	save	r12
	save	r13
	save	r14
	save	r15
	sub	rsp, frame
	.cfi_adjust_cfa_offset frame
	mov	[rsp + arguments], rdi
	keep	prefetch_rate, rate
	keep	x, next_x
	keep	y, next_y
	keep	products, products_left
	keep	prefetch, next_prefetch
	.if \panels == 2
	mov	r12, [rdi + prefetch_x]
	mov	r11, [rdi + x_rate]
	.elseif \rows < 12
	mov	r14, [rdi + prefetch_x]
	keep	x_rate, rate_of_x
	.endif

1:	mov	rdi, [rsp + arguments]
	mov	r15, [rdi + panel_0]
	mov	rax, [rdi + piece_bytes]
	add	rax, r15
	mov	[rsp + piece_end], rax
	.if \panels == 2
	mov	r14, [rdi + panel_1]
	sub	r14, r15
	mov	r13, [rdi + prefetch_panel]
	.endif
	mov	rdi, [rsp + next_x]
	each_row \rows, load_x
	add	rdi, 8*\rows
	mov	[rsp + next_x], rdi
	mov	rdi, [rsp + next_prefetch]
	xor	ebp, ebp
	clear_sums %(2*\panels*\rows)

	.p2align 6
2:	prefetcht0 [rdi]
	.if \panels == 2
	prefetcht0 [rdi + r13]
	prefetcht0 [r12]
	add	r12, r11
	.else
	.if \lines == 2
	prefetcht0 [rdi + 64]
	.endif
	.if \rows < 12
	prefetcht1 [r14]
	add	r14, [rsp + rate_of_x]
	.endif
	.endif
	add	rdi, [rsp + rate]
	vmovdqu32 zmm24, [r15]
	vmovdqu32 zmm25, [r15 + 64]
	.if \panels == 2
	vmovdqu32 zmm26, [r15 + r14]
	vmovdqu32 zmm27, [r15 + r14 + 64]
	.endif
	sub	r15, -128
	each_row \rows, dots_\panels
	add	rbp, 4
	cmp	r15, [rsp + piece_end]
	jne	2b

	mov	[rsp + this_prefetch], rdi
	mov	rdi, [rsp + arguments]
	cmp	rbp, [rdi + row_bytes]
	je	3f
	add	r15, [rdi + piece_gap]
	mov	rdi, [rdi + piece_bytes]
	add	rdi, r15
	mov	[rsp + piece_end], rdi
	mov	rdi, [rsp + arguments]
	mov	rdi, [rdi + prefetch_gap]
	add	rdi, [rsp + this_prefetch]
	jmp	2b

3:	mov	rdx, [rdi + prefetch_bytes]
	add	[rsp + next_prefetch], rdx
	mov	rcx, [rdi + panel_offset]
	cmp	qword ptr [rdi + adds], 0
	mov	rdi, [rsp + next_y]
	je	4f
	finish	\rows, \panels, add_to
	jmp	5f
4:	finish	\rows, \panels, put_in
5:	add	rdi, 8*\rows
	mov	[rsp + next_y], rdi
	dec	qword ptr [rsp + products_left]
	jnz	1b

	vzeroupper
	add	rsp, frame
	.cfi_adjust_cfa_offset -frame
	restore	r15
	restore	r14
	restore	r13
	restore	r12
	restore	rbx
	restore	rbp
	ret
	.cfi_endproc
	.size	kernel_\panels\()_\lines\()_\rows, . - kernel_\panels\()_\lines\()_\rows
	.endm

// The kernels and their addresses, by rows - 1.
	.macro kernels panels, lines, rows:vararg
	.text
	.irp n, \rows
	kernel	\panels, \lines, \n
	.endr
	.section .data.rel.ro, "aw"
	.p2align 3
	.globl	cleave_dot_kernels_\panels\()_\lines
	.hidden	cleave_dot_kernels_\panels\()_\lines
	.type	cleave_dot_kernels_\panels\()_\lines, @object
cleave_dot_kernels_\panels\()_\lines:
	.irp n, \rows
	.quad	kernel_\panels\()_\lines\()_\n
	.endr
	.size	cleave_dot_kernels_\panels\()_\lines, . - cleave_dot_kernels_\panels\()_\lines
	.endm
	kernels	1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
	kernels	1, 2, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12
	kernels	2, 2, 1, 2, 3, 4, 5, 6

	.section .note.GNU-stack, "", @progbits
