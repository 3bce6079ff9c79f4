using Flux, PrunableFlux, Random, Test

counts(model) = [count(l.mask) for l in prunables(model)]
widths(model) = [size(first(model).mask, 2); [size(l.mask, 1) for l in model]]

@testset "exclude and min_kept" begin
    model = prune!(mlp(Xoshiro(1), 10, 8, 6, 4), Magnitude(); sparsity = 0.9, structure = Global(exclude = (1, -1)))
    @test counts(model) == [80, 48 - round(Int, 0.9 * 48), 24]
    model = mlp(Xoshiro(1), 10, 8, 6, 4)
    model[2].dense.weight .*= 1f-6
    @test_logs (:warn, r"2nd layer") prune!(deepcopy(model), Magnitude(); sparsity = 0.8)
    kept = @test_logs prune!(deepcopy(model), Magnitude(); sparsity = 0.8, structure = Global(min_kept = 3))
    @test count(kept[2].mask) == 3
    @test sort(abs.(model[2].dense.weight[kept[2].mask])) == sort(vec(abs.(model[2].dense.weight)))[(end - 2):end]
    @test sum(counts(kept)) == 152 - round(Int, 0.8 * 152)
    for structure in (Global(exclude = (0,)), Global(exclude = (4,)), Global(exclude = 1:3), Global(min_kept = 40))
        before = counts(model)
        @test_throws ArgumentError prune!(model, Magnitude(); sparsity = 0.8, structure)
        @test counts(model) == before
    end
    prune!(model, Magnitude(); sparsity = [0.5, 0.25], structure = Layerwise(exclude = 2))
    @test counts(model) == [40, 48, 18]
end

@testset "PerOutput, N:M" begin
    model = prune!(mlp(Xoshiro(2), 8, 12, 4), Magnitude(); sparsity = 0.75, structure = PerOutput())
    @test all(==(2), sum(model[1].mask; dims = 2)) && all(==(3), sum(model[2].mask; dims = 2))
    model = mlp(Xoshiro(2), 8, 12, 4)
    W = copy(model[1].dense.weight)
    prune!(model, Magnitude(); structure = NofM(1, 4), sparsity = 0.25)
    @test all(==(3), sum(reshape(model[1].mask', 4, :); dims = 1))
    prune!(model, Magnitude(); structure = NofM(1, 4))
    for layer in model
        @test all(==(1), sum(reshape(layer.mask', 4, :); dims = 1))
    end
    @test all(i -> model[1].mask[i, argmax(abs.(W[i, 5:8])) + 4], 1:12)
    @test_throws ArgumentError prune!(mlp(Xoshiro(2), 8, 12, 4), Magnitude(); structure = NofM(2, 4), sparsity = 0.6)
    @test_throws ArgumentError prune!(mlp(Xoshiro(2), 6, 12, 4), Magnitude(); structure = NofM(2, 4))
    @test_throws ArgumentError NofM(4, 4)
end

@testset "ERK" begin
    model = prune!(mlp(Xoshiro(3), 300, 200, 100, 10), Magnitude(); sparsity = 0.9, structure = ERK())
    n = [length(l.mask) for l in model]
    @test sum(counts(model)) ≈ 0.1 * sum(n) atol = 2
    sides = [500, 300, 110]
    scale = counts(model) ./ sides
    @test scale[1] ≈ scale[2] rtol = 0.01
    thin = prune!(mlp(Xoshiro(3), 400, 300, 2), Magnitude(); sparsity = 0.5, structure = ERK())
    @test count(thin[2].mask) == 600
    @test sum(counts(thin)) ≈ 0.5 * 120600 atol = 1
end

@testset "neurons by L1 and L2 norm" begin
    for norm in (1, 2), layerwise in (false, true)
        model = mlp(Xoshiro(4), 7, 9, 6, 3)
        norms = [vec(sum(abs.(l.dense.weight) .^ norm; dims = 2) .^ (1 / norm)) for l in model[1:2]]
        prune!(model, Magnitude(); sparsity = 0.4, structure = Neurons(; layerwise, norm))
        gone = [vec(.!any(l.mask; dims = 2)) for l in model[1:2]]
        @test layerwise ? count.(gone) == [4, 2] : sum(count, gone) == 6
        groups = layerwise ? [[1], [2]] : [[1, 2]]
        for g in groups
            out, left = (reduce(vcat, getindex.(norms[g], choose.(gone[g]))) for choose in (identity, x -> .!x))
            @test maximum(out) < minimum(left)
        end
        @test all(l -> !any(model[l + 1].mask[:, gone[l]]), 1:2)
        @test all(any(model[3].mask; dims = 2))
    end
    @test_throws ArgumentError prune!(mlp(Xoshiro(4), 3, 2), Magnitude(); sparsity = 0.5, structure = Neurons())
    @test_throws ArgumentError prune!(Chain(PrunableDense(2 => 2), softmax, PrunableDense(2 => 2)), Magnitude();
                                      sparsity = 0.5, structure = Neurons())
end

@testset "compact is the same network, smaller: trial $trial" for trial in 1:30
    rng = Xoshiro(trial)
    model = mlp(rng, rand(rng, 1:12, rand(rng, 2:5))...; σ = rand(rng, (relu, tanh, sigmoid)))
    rand(rng, Bool) && (model = Chain(map(l -> PrunableDense(Dense(l.dense.weight, false, l.dense.σ)), model.layers)...))
    Base.CoreLogging.with_logger(Base.CoreLogging.NullLogger()) do
        prune!(model, Magnitude(); sparsity = 0.97rand(rng))
        length(model) > 1 && rand(rng, Bool) && prune!(deepcopy(model), Magnitude(); sparsity = 0.99, structure = Neurons())
    end
    small = compact(model)
    x = randn(rng, Float32, size(model[1].mask, 2), 20)
    @test small(x) ≈ model(x) rtol = 1e-5
    for (layer, next) in zip(small.layers, small.layers[2:end])
        n = size(layer.mask, 1)
        @test n == 1 || all(any(layer.mask; dims = 2)) && all(any(next.mask; dims = 1))
    end
    @test widths(small)[[1, end]] == widths(model)[[1, end]] && all(widths(small) .<= widths(model))
    @test widths(compact(small)) == widths(small)
    small[1].dense.weight .= 7
    @test 7 ∉ model[1].dense.weight
end

@testset "compact keeps what is between" begin
    model = Chain(Flux.flatten, Chain(PrunableDense(4 => 6, relu), Dropout(0.5)), PrunableDense(6 => 2))
    prune!(model, Magnitude(); sparsity = 0.5, structure = Neurons())
    small = compact(model)
    @test small[1] === Flux.flatten && small[2][2] isa Dropout && size(small[2][1].mask) == (3, 4)
    x = rand(Float32, 2, 2, 5)
    @test small(x) ≈ model(x)
    @test_throws ArgumentError compact(Chain(Dense(2 => 2)))
    twice = PrunableDense(2 => 2)
    @test_throws ArgumentError compact(Chain(twice, twice))
    norm = BatchNorm(6)
    @test_throws ArgumentError compact(Chain(PrunableDense(4 => 6), norm, PrunableDense(6 => 6), norm, PrunableDense(6 => 2)))
end

@testset "every saliency of neurons with every structure: $(nameof(typeof(structure)))" for structure in
        (Global(), Layerwise(), PerOutput(), ERK(), NofM(2, 4), Neurons(), Neurons(layerwise = true))
    rng = Xoshiro(5)
    x, y = randn(rng, Float32, 8, 30), Flux.onehotbatch(mod1.(1:30, 3), 1:3)
    for criterion in (Magnitude(), Magnitude(scaled = true), Threshold(), Taylor(), SynFlow(iterations = 3), OBD(), OBS(), Wanda(),
                      Activation(), Redundancy(), Redundancy(activations = true), RandomSaliency())
        model = mlp(rng, 8, 12, 8, 3)
        if PrunableFlux.of_neurons(criterion) && !(structure isa Neurons)
            @test_throws ArgumentError prune!(model, criterion, (x, y); sparsity = 0.25, structure)
            continue
        end
        prune!(model, criterion, (x, y); sparsity = 0.25, structure)
        once = counts(model)
        structure isa Neurons || @test sum(once) ≈ 0.75 * sum(l -> length(l.mask), model) atol = 3
        structure isa Neurons && @test sum(l -> count(!, any(l.mask; dims = 2)), model) == 5
        @test counts(prune!(model, criterion, (x, y); sparsity = 0.25, structure)) == once
        @test counts(prune!(model, criterion, (x, y); sparsity = 0.5, structure)) <= once
    end
end
