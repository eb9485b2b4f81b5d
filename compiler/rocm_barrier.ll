; A barrier of a block that orders memory too. TVM's own is the bare instruction, at which LLVM
; waits for no memory operation and after which caches may be stale. Returns 0, as TVM's
; statements are values.
declare void @llvm.amdgcn.s.barrier() convergent

define linkonce_odr hidden i32 @shardwright_barrier() convergent {
  fence syncscope("workgroup") release
  call void @llvm.amdgcn.s.barrier()
  fence syncscope("workgroup") acquire
  ret i32 0
}
