# Train and prune one network in several processes, each with its part of the samples, by Flux's own DistributedUtils on MPI:
#
#     mpiexecjl -n 2 julia --project examples/data_parallel.jl [rounds]
#
# in a project with Flux, MPI and PrunableFlux. In each step gradients are averaged over the processes, so that all
# have the same network; and it is the one that a single process makes of all samples, to rounding, which is checked here.

using Flux, MPI, PrunableFlux, Random
using Flux: DataLoader, DistributedUtils, MPIBackend, logitcrossentropy

rounds, samples, batchsize = parse(Int, get(ARGS, 1, "4")), 1000, 50

DistributedUtils.initialize(MPIBackend)
backend = DistributedUtils.get_distributed_backend(MPIBackend)
processes, rank = DistributedUtils.total_workers(backend), DistributedUtils.local_rank(backend)

"Give all processes the weights and masks of the first."
synchronize!(model) = DistributedUtils.synchronize!!(backend, DistributedUtils.FluxDistributedModel(model))

# Parts of one size, as all gradients count the same in the average.
x = randn(Xoshiro(0), Float32, 2, samples * processes)
y = Flux.onehotbatch(vec(prod(x; dims = 1)) .> 0, (false, true))
part = DistributedUtils.DistributedDataContainer(backend, (x, y))
model = synchronize!(prunable(Chain(Dense(2 => 64, relu), Dense(64 => 64, relu), Dense(64 => 2))))
opt = Flux.setup(DistributedUtils.DistributedOptimizer(backend, Adam(3f-3)), model)

# For the check: a single process, whose batches are those of all processes together.
single, single_opt = deepcopy(model), Flux.setup(Adam(3f-3), model)
batches = map(Iterators.partition(1:samples, batchsize)) do places
    of_all = vec(places .+ samples .* (0:(processes - 1))')
    x[:, of_all], y[:, of_all]
end

for n in 1:rounds
    for (network, data, memory) in ((model, DataLoader(part; batchsize), opt), (single, batches, single_opt))
        foreach(epoch -> train_masked!(logitcrossentropy, network, data, memory), 1:5)
        prune!(network, Magnitude(); sparsity = 1 - 0.7^n, opt = memory)
    end
    synchronize!(model) # not needed with Magnitude, but where a criterion looks at samples, which differ
    apart = maximum(abs, model(x) .- single(x)) / maximum(abs, single(x))
    apart < 1e-3 || error("process $rank is $apart from what a single process has trained")
    rank == 0 && println("round $n, $processes processes: $(round(Int, 100sparsity(model))) % pruned, accuracy ",
                         round(Int, 100evaluate(model, (x, y)).accuracy), " %, apart from a single process by ", apart)
end
