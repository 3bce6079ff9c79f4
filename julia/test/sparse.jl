using Flux, PrunableFlux, Random, Test
using PrunableFlux: AVX512, DenseKernel, DenseTrainer, SparseKernel, SparseTrainer, step!, store!, trainer

relative(a, b) = maximum(abs, a .- b; init = 0) / max(maximum(abs, b; init = 0), 1)

@testset "a sparse network is the masked network: trial $trial" for trial in 1:30
    rng = Xoshiro(trial)
    widths = rand(rng, (1, 3, 16, 17, 64, 130, 300), rand(rng, 2:5))
    model = mlp(rng, widths...; σ = rand(rng, (relu, tanh, sigmoid, identity)))
    trial % 3 == 0 && (model = Chain(PrunableDense(Dense(randn(rng, Float32, widths[1], 5), false)), model, identity))
    foreach(layer -> layer.dense.weight ./= sqrt(size(layer.mask, 2)), prunables(model)) # so that sums stay of order 1
    prune!(model, RandomSaliency(seed = trial); sparsity = rand(rng, (0, 0.5, 0.9, 0.99)))
    for kernels in (:auto, :sparse, :dense)
        fast = sparsify(model; kernels)
        for n in (0, 1, 2, 16, 33, 64, 65, 200)
            x = randn(rng, Float32, size(first(prunables(model)), 2), n)
            @test relative(fast(x), model(x)) < 1e-5
            n == 1 && @test relative(fast(vec(x)), model(vec(x))) < 1e-5
        end
    end
end

module OtherProcessors # the kernels as they are with and without AVX-512
using PrunableFlux
module With end
module Without end
for (place, answer) in ((With, "true"), (Without, "false"))
    Core.eval(place, :(using PrunableFlux: CPUID, Vec, mul!, shufflevector, vload, vstore))
    for file in ("kernels.jl", "windows.jl")
        source = read(joinpath(pkgdir(PrunableFlux), "src", "sparse", file), String)
        Base.include_string(place, replace(source, r"CPUID.test_cpu_feature\(\S+\)" => answer))
    end
end
end

@testset "transposition, and whether all is finite" begin
    for rows in (1, 4, 15, 16, 37, 64), columns in (1, 3, 4, 10, 16, 26, 40)
        from, to = randn(Float32, rows + 2, columns), fill(-7.0f0, columns + 3, rows)
        transpose!() = GC.@preserve from to PrunableFlux.transpose_into!(pointer(to), columns + 3, pointer(from), rows + 2, rows,
                                                                       columns)
        @test transpose!() && to[1:columns, :] == permutedims(from[1:rows, :]) && all(==(-7), to[(columns + 1):end, :])
        for place in CartesianIndices((rows, columns))
            from[place] = rand((NaN32, Inf32, -Inf32))
            transpose!() && error("$(from[place]) at $place of ($rows, $columns) was not seen")
            from[place] = 1
        end
    end
end

const PROCESSORS = AVX512 ? (OtherProcessors.With, OtherProcessors.Without) : (OtherProcessors.Without,)

@testset "sparse kernels, AVX-512: $(kernels.AVX512)" for kernels in PROCESSORS
    rng = Xoshiro(1)
    for (inputs, outputs) in ((1, 1), (3, 2), (17, 5), (300, 100), (500, 33)), density in (0.02, 0.3, 1)
        mask = rand(rng, outputs, inputs) .< density
        W, bias = randn(rng, Float32, outputs, inputs), randn(rng, Float32, outputs)
        uneven, places = kernels.packed(kernels.SparseKernel{kernels.LOW}, permutedims(mask), (outputs, 1), bias, true)
        uneven.values .= W[places]
        even = map(height -> kernels.SparseKernel{height}(W, mask, bias, true), (kernels.LOW, kernels.HIGH))
        for V in 1:4
            x, dy = randn(rng, Float32, 16V, inputs), randn(rng, Float32, 16V, outputs)
            for kernel in (uneven, even...)
                y = kernels.multiply!(zeros(Float32, 16V, outputs), x, kernel, Val(V))
                @test relative(y, relu.(x * (W .* mask)' .+ bias')) < 1e-5
            end
            slopes = kernels.add_slopes!(ones(Float32, count(mask)), dy, x, uneven, Val(V))
            @test relative(slopes, 1 .+ (dy' * x)[places]) < 1e-5
        end
    end
end

@testset "kernels of windows, AVX-512: $(kernels.AVX512)" for kernels in PROCESSORS
    rng = Xoshiro(1)
    for (places, size, stride) in (((9, 4), (3, 2), (1, 1)), ((5, 5), (1, 1), (1, 2)), ((31, 3), (5, 3), (3, 1)), ((12,), (2,), (1,))),
        channels in (1, 20), outputs in (1, 9), density in (0.05, 0.5, 1)

        plane, taps = prod(places) + 2, prod(size) * channels
        windows = kernels.Windows((places..., channels), size, stride, map(one, size), plane)
        mask = rand(rng, outputs, taps) .< density
        W, bias = randn(rng, Float32, outputs, taps), randn(rng, Float32, outputs)
        for V in 1:4
            images = randn(rng, Float32, places..., channels, 16V)
            expected = relu.(NNlib.conv(images, reshape(permutedims(W .* mask), size..., channels, outputs); stride, flipped = true) .+
                             reshape(bias, map(one, size)..., :))
            x = fill(NaN32, 16V, plane, channels) # nothing between channels counts
            x[:, 1:prod(places), :] = permutedims(reshape(images, :, channels, 16V), (3, 1, 2))
            for kernel in (kernels.SparseWindows(windows, W, mask, bias, true), kernels.DenseKernel(windows, W .* mask, bias, true))
                y = kernels.multiply!(zeros(Float32, 16V, kernels.outputs(kernel)), reshape(x, 16V, :), kernel, Val(V))
                @test relative(permutedims(y), reshape(expected, :, 16V)) < 1e-5
            end
        end
    end
end

@testset "sparsify" begin
    rng = Xoshiro(1)
    model = prune!(mlp(rng, 40, 30, 20, 5), Magnitude(); sparsity = 0.8)
    x = randn(rng, Float32, 40, 300)
    fast = sparsify(model; kernels = [:dense, :sparse, :auto])
    @test fast.panels[1].kernel isa DenseKernel && fast.panels[2].kernel isa SparseKernel
    @test repr(fast) == "SparseNetwork(40 => 30 => 20 => 5; density=0.2)"
    y = fast(x)
    @test y ≈ model(x) && y ≈ fast(Float64.(x)) && y ≈ fast(view(x, :, 1:300)) && y ≈ fast(reshape(x, 8, 5, 300))
    @test all(fetch.([Threads.@spawn fast(x) == y for _ in 1:20]))
    foreach(layer -> layer.dense.weight .= 0, model)
    @test fast(x) == y
    @test_throws DimensionMismatch fast(x[1:39, :])
    @test_throws ArgumentError sparsify(model; kernels = :fast)
    @test_throws ArgumentError sparsify(model; kernels = [:sparse])
    @test_throws ArgumentError sparsify(prunable(Chain(Conv((3, 3), 1 => 2), Flux.flatten, Dense(2 => 2))))
    @test_throws ArgumentError sparsify(Chain(relu))
    @test_throws "kernels must be :auto" sparsify(model; kernels = "auto")
    @test size(fast(x[:, 1:0])) == (5, 0)
    for bad in (NaN32, Inf32), n in (1, 300)
        broken = x[:, 1:n]
        broken[7, n] = bad
        @test_throws "x must be finite" fast(broken)
    end
    empty = sparsify(mask!(Chain(PrunableDense(Dense(randn(rng, Float32, 3, 4), ones(Float32, 3)), falses(3, 4)))))
    @test empty(randn(rng, Float32, 4, 2)) == ones(3, 2)
end

@testset "neurons without consequence are not computed" begin
    rng = Xoshiro(3)
    model = mlp(rng, 20, 12, 9, 3)
    model[2].mask[:, 1:5] .= false # nothing comes out of these
    model[3].mask[:, 7:9] .= false
    model[2].mask[2:3, :] .= false # and nothing goes into these
    mask!(model)
    x = randn(rng, Float32, 20, 70)
    for kernels in (:sparse, :dense)
        fast = sparsify(model; kernels)
        @test map(layer -> PrunableFlux.outputs(layer.kernel), fast.panels) == [7, 4, 3]
        @test relative(fast(x), model(x)) < 1e-5 && relative(fast(x[:, 1]), model(x[:, 1])) < 1e-5
        @test repr(fast) == "SparseNetwork(20 => 12 => 9 => 3; density=$(round(density(model); sigdigits = 3)))"
    end
end

@testset "training on kept weights is training: trial $trial" for trial in 1:30
    rng = Xoshiro(trial)
    widths = [rand(rng, (1, 3, 17, 64, 200), rand(rng, 1:3)); 4]
    model = mlp(rng, rand(rng, (5, 30, 170)), widths...; σ = rand(rng, (relu, tanh, sigmoid, identity)))
    trial % 3 == 0 && (model = Chain(PrunableDense(Dense(randn(rng, Float32, 8, size(model[1], 2)), false)),
                                     PrunableDense(Dense(randn(rng, Float32, size(model[1], 2), 8))), model.layers...))
    foreach(layer -> layer.dense.weight ./= sqrt(size(layer.mask, 2)), model)
    prune!(model, RandomSaliency(seed = trial); sparsity = rand(rng, (0.35, 0.9, 0.97)), structure = Global(min_kept = 1))
    rule = rand(rng, (Descent(0.1f0), Momentum(0.1f0), Flux.OptimiserChain(Flux.WeightDecay(0.01f0), Nesterov(0.1f0))))
    theirs, ours = deepcopy(model), deepcopy(model)
    their_opt, our_opt = Flux.setup(rule, theirs), Flux.setup(rule, ours)
    fast = trainer(ours, our_opt)
    @test fast isa SparseTrainer
    for n in (2, 16, 33, 64, 65, 200, 10)
        x, y = randn(rng, Float32, size(first(model), 2), n), Flux.onehotbatch(rand(rng, 1:4, n), 1:4)
        @test step!(Flux.logitcrossentropy, fast, our_opt, x, y) ≈ step!(Flux.logitcrossentropy, theirs, their_opt, x, y)
        rand(rng, Bool) && continue # and on from where it is
        for (a, b) in zip(store!(fast), theirs)
            @test relative(a.dense.weight, b.dense.weight) < 1e-5 && iszero(a.dense.weight[.!a.mask])
            a.dense.bias === false || @test relative(a.dense.bias, b.dense.bias) < 1e-5
        end
    end
end

@testset "a trainer is taken up again while masks are the same" begin
    rng = Xoshiro(2)
    model = prune!(mlp(rng, 40, 30, 5), Magnitude(); sparsity = 0.8)
    opt = Flux.setup(Adam(0.01), model)
    last_one = trainer(model, opt)
    x, y = randn(rng, Float32, 40, 16), Flux.onehotbatch(rand(rng, 1:5, 16), 1:5)
    again() = trainer(model, opt, last_one)
    train(trained, model, opt) = (step!(Flux.logitcrossentropy, trained, opt, x, y); store!(trained))
    train(last_one, model, opt)
    @test again() === last_one
    @test trainer(model, Flux.setup(Adam(0.01), model), last_one) !== last_one
    @test trainer(deepcopy(model), opt, last_one) !== last_one
    copy, copy_opt = deepcopy((model, opt))
    model[1].dense.weight[model[1].mask] .*= 2 # which it is to see
    copy[1].dense.weight[copy[1].mask] .*= 2
    @test train(again(), model, opt)[1].dense.weight == train(trainer(copy, copy_opt), copy, copy_opt)[1].dense.weight
    kept, pruned = findfirst(model[2].mask), findfirst(!, model[2].mask)
    model[2].mask[kept], model[2].mask[pruned] = false, true
    @test again() !== last_one
    model[2].mask[kept], model[2].mask[pruned] = true, false
    @test again() === last_one
    prune!(model, Magnitude(); sparsity = 0.9)
    @test again() !== last_one
    @test trainer(model, opt, nothing) isa SparseTrainer && trainer(model, opt, model) isa SparseTrainer
end

struct HalfStep <: Optimisers.AbstractRule end
Optimisers.init(::HalfStep, x) = nothing
Optimisers.apply!(::HalfStep, state, x, dx) = state, dx ./ 2

memory_arrays(leaf::Optimisers.Leaf) = memory_arrays(leaf.state)
memory_arrays(array::Array) = [array]
memory_arrays(parts::Union{Tuple,NamedTuple}) = mapreduce(memory_arrays, vcat, values(parts); init = Array[])
memory_arrays(other) = Array[]

# In Float64 there are no kernels, and the same rule takes the same steps.
@testset "the memory of kept weights: $rule" for rule in (
        Adam(0.001), AdamW(0.001), RMSProp(0.001), AdaGrad(0.01), AdaDelta(), AMSGrad(0.001), NAdam(0.001), RAdam(0.001), AdaMax(0.001),
        OAdam(0.001), AdaBelief(0.001), Nesterov(0.01), Flux.OptimiserChain(Flux.ClipNorm(0.5), Flux.AccumGrad(2), Flux.SignDecay(0.01), Adam(0.001)))
    rng = Xoshiro(4)
    model = prune!(mlp(rng, 30, 40, 20, 5), Magnitude(); sparsity = [0.9, 0.2, 0.8], structure = Layerwise())
    batches = [(randn(rng, Float32, 30, 64), Flux.onehotbatch(rand(rng, 1:5, 64), 1:5)) for _ in 1:12]
    theirs, opt = Flux.f64(model), Flux.setup(rule, model)
    their_opt = Flux.setup(rule, theirs)
    for part in (batches[1:5], batches[6:12])
        @test trainer(model, opt) isa SparseTrainer && trainer(theirs, their_opt) isa DenseTrainer
        train_masked!(Flux.logitcrossentropy, model, part, opt)
        train_masked!(Flux.logitcrossentropy, theirs, [(Float64.(x), y) for (x, y) in part], their_opt)
        Optimisers.adjust!(opt, 0.0005), Optimisers.adjust!(their_opt, 0.0005)
    end
    for (a, b) in zip(model, theirs)
        @test relative(a.dense.weight, b.dense.weight) < 1e-4 && relative(a.dense.bias, b.dense.bias) < 1e-4
    end
    ours_memory, their_memory = memory_arrays(opt), memory_arrays(their_opt)
    @test length(ours_memory) == length(their_memory)
    @test all(size(a) == size(b) && relative(a, b) < 1e-3 for (a, b) in zip(ours_memory, their_memory))
end

@testset "what is trained on kept weights" begin
    rng = Xoshiro(2)
    model = prune!(mlp(rng, 40, 30, 20, 5), Magnitude(); sparsity = [0.9, 0.2, 0.9], structure = Layerwise())
    x, y = randn(rng, Float32, 40, 50), Flux.onehotbatch(rand(rng, 1:5, 50), 1:5)
    opt, setup = Flux.setup(Adam(), model), m -> (m, Flux.setup(Adam(), m))
    @test trainer(model, opt) isa SparseTrainer
    @test map(layer -> layer.products isa PrunableFlux.DenseProducts, trainer(model, opt).layers) == [false, true, false]
    @test trainer(setup(mlp(rng, 4, 3))...) isa DenseTrainer && trainer(setup(Flux.f64(model))...) isa DenseTrainer
    @test trainer(setup(prune!(Chain(PrunableDense(4 => 3, gelu)), Magnitude(); sparsity = 0.9))...) isa DenseTrainer
    @test trainer(setup(Chain(model[1], PrunableDense(model[1].dense, model[1].mask)))...) isa DenseTrainer # tied
    @test trainer(model, Flux.setup(HalfStep(), model)) isa DenseTrainer # may not be of single weights
    named = Chain(; zip((:a, :b, :c), deepcopy(model.layers))...)
    before = deepcopy(model)
    @test_throws DomainError step!((ŷ, y) -> NaN32 * sum(ŷ), trainer(model, opt), opt, x, y)
    @test_throws DimensionMismatch step!(Flux.logitcrossentropy, trainer(model, opt), opt, x[1:39, :], y)
    @test all(a.dense.weight == b.dense.weight for (a, b) in zip(model, before))
    losses = train_masked!(Flux.logitcrossentropy, model, Iterators.repeated((x, y), 100), opt)
    @test losses[end] < losses[1] && all(iszero(layer.dense.weight[.!layer.mask]) for layer in model)
    @test train_masked!(Flux.logitcrossentropy, named, Iterators.repeated((x, y), 100), Flux.setup(Adam(), named)) == losses
    @test all(a.dense.weight == b.dense.weight for (a, b) in zip(model, named))
    steps = [(x, y), (x, y), (x, NaN32 .* y)] # what was learned before the error is kept
    halted, whole = deepcopy(before), deepcopy(before)
    @test_throws DomainError train_masked!(Flux.logitcrossentropy, halted, steps, Flux.setup(Adam(), halted))
    train_masked!(Flux.logitcrossentropy, whole, steps[1:2], Flux.setup(Adam(), whole))
    @test all(a.dense.weight == b.dense.weight != c.dense.weight for (a, b, c) in zip(halted, whole, before))
    opt = Flux.setup(Adam(), halted)
    Optimisers.freeze!(opt.layers[1])
    train_masked!(Flux.logitcrossentropy, halted, steps[1:2], opt)
    @test halted[1].dense.weight == whole[1].dense.weight && halted[3].dense.weight != whole[3].dense.weight
    @test train_masked!((ŷ, y) -> 0.0f0, model, [(x, y)], Flux.setup(Adam(), model)) == [0]
    @test_throws DomainError train_masked!(Flux.logitcrossentropy, model, [(x[:, 1:0], y[:, 1:0])], Flux.setup(Adam(), model))
    @test train_masked!(Flux.logitcrossentropy, model, [(Float64.(x), y), (x[:, 1], y[:, 1])], opt) isa Vector{Float32}
end
